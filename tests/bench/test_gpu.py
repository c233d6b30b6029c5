"""The GPU case: the gate in the interpreter, what is said without a GPU, bars from rows, definitions of the peers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from trilevel.attention.levels import Levels
from trilevel.bench import gpu as case_module
from trilevel.bench.contenders import dense
from trilevel.bench.gpu import COPY, LOCAL, GpuCase, bars, nsa_rows, own, peers, run
from trilevel.bench.problem import Problem
from trilevel.bench.show import gpu_table
from trilevel.cli.bench import app
from trilevel.errors import InputError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: the kernels are compiled")


@without_gpu
def test_smoke_takes_ours_through_the_gate_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'trilevel[gpu]'")
    result = CliRunner().invoke(app, ["gpu", "--smoke", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["case"] == "gpu"
    assert document["bars"] == []
    assert [row["status"] for row in document["rows"]] == ["measured"] * 3


@without_gpu
def test_without_a_gpu_it_says_what_is_missing() -> None:
    with pytest.raises(InputError, match=r"needs an NVIDIA GPU.*--smoke"):
        run(GpuCase())


def test_ours_failing_breaks_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(dense(), name=LOCAL, build=lambda p: lambda: 1.5 * p.value)
    monkeypatch.setattr(case_module, "own", lambda _levels: [wrong])
    report = run(GpuCase.smoke())
    assert report.broken == [LOCAL]
    assert "above" in report.rows[0]["reason"]
    assert not report.holds


def test_peers_that_are_absent_or_raise_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: Problem) -> Callable[[], Tensor]:
        raise RuntimeError("no kernel image")

    absent = dataclasses.replace(dense(), name="gone", package="no_such_package")
    broken = dataclasses.replace(dense(), name="raises", build=build)
    monkeypatch.setattr(case_module, "own", lambda _levels: [absent, broken, dense()])
    report = run(GpuCase.smoke())
    assert [row["status"] for row in report.rows] == ["absent", "failed", "measured"]
    assert "no_such_package is not installed" in report.rows[0]["reason"]
    assert "no kernel image" in report.rows[1]["reason"]
    assert gpu_table(report).row_count == 3


def test_contenders_are_ours_and_four_peers() -> None:
    assert next(contender.name for contender in own(Levels())) == LOCAL
    assert [contender.matches for contender in peers()] == [None, "local", "local", None]


def row(name: str, ms: float | None, matches: str | None = None) -> dict[str, Any]:
    status = "absent" if ms is None else "measured"
    return {"contender": name, "matches": matches, "status": status, **({} if ms is None else {"median_ms": ms})}


def test_bars_compare_with_the_copy_and_the_best_windowed_peer() -> None:
    rows = [row(LOCAL, 0.04), row(COPY, 0.06), row("a", 0.12, "local"), row("b", 0.1, "local"), row("dense", 0.01)]
    share, best = bars(rows)
    assert share.name == "triton_local_vs_copy_bandwidth"
    assert share.value == pytest.approx(0.75)
    assert best.name == "triton_local_vs_best_peer"
    assert best.value == pytest.approx(2.5)
    assert share.holds
    assert best.holds


def test_bars_do_not_hold_without_measurements() -> None:
    assert [bar.value for bar in bars([row(LOCAL, 0.04), row("a", None, "local")])] == [None, None]
    assert not any(bar.holds for bar in bars([]))


def test_nsa_definition_token_by_token() -> None:
    problem = Problem.draw(150, torch.float64, Levels(), heads=2, dim=3)
    rows = torch.tensor([0, 63, 64, 149])
    found = nsa_rows(problem, rows, torch.float64)
    q, k, v = (x[0] for x in problem.as_dtype(torch.float64))
    for place, i in enumerate(rows.tolist()):
        seen = [j for j in range(i + 1) if i // 64 - j // 64 <= 1]
        weights = torch.softmax(k[seen] @ q[i] / 3**0.5, 0)
        torch.testing.assert_close(found[7, place], weights @ v[seen])
