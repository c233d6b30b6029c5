"""The attention case: definitions agree with `reference`, a wrong contender is never timed, bars come from the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import Levels
from trilevel.bench import attention as case_module
from trilevel.bench.attention import AttentionCase, bars, digest, run
from trilevel.bench.contenders import Contender, dense, window_block_mask
from trilevel.bench.problem import Problem, dense_rows, levels_rows, window_rows


def small(mode: Any = "calibrated") -> Levels:
    return Levels(mode=mode, window=7, region_size=None, num_regions=5, num_global_tokens=6)


@pytest.mark.parametrize("mode", ["calibrated", "strict"])
@pytest.mark.parametrize("tokens", [1, 2, 13, 101])
def test_sampled_definition_agrees_with_reference(mode: str, tokens: int) -> None:
    problem = Problem.draw(tokens, torch.float64, small(mode), heads=11, dim=3)
    rows = problem.sampled_rows(17)
    out = multi_level_attention(
        problem.query, problem.key, problem.value, levels=problem.levels, impl="reference",
        global_score=problem.global_score.double(),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out[0][:, rows], levels_rows(problem, rows, torch.float64, problem.levels))


def test_window_definition_is_dense_where_the_window_covers_the_input() -> None:
    problem = Problem.draw(4, torch.float64, small(), heads=3, dim=5)
    rows = problem.sampled_rows()
    torch.testing.assert_close(window_rows(problem, rows, torch.float64), dense_rows(problem, rows, torch.float64))


@pytest.mark.parametrize(("tokens", "radius", "block"), [(64, 3, 8), (61, 8, 8), (7, 20, 4), (40, 9, 4)])
def test_block_mask_holds_every_block_of_the_window(tokens: int, radius: int, block: int) -> None:
    blocks = -(-tokens // block)
    wanted = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(tokens):
        for j in range(tokens):
            if abs(i - j) <= radius:
                wanted[i // block, j // block] = True
    made = window_block_mask(tokens, radius, block).to_dense()[0, 0].bool()
    assert not (wanted & ~made).any()
    assert made.sum() <= blocks * (2 * -(-radius // block) + 1)


def tiny(**changes: Any) -> AttentionCase:
    case = AttentionCase(
        lengths={64: 0.0},
        levels=small(),
        heads=8,
        dim=16,
        without=frozenset({"FlexAttention", "HF Longformer"}),
        training=None,
        scaling=None,
    )
    return dataclasses.replace(case, **changes)


def with_peers(monkeypatch: pytest.MonkeyPatch, *peers: Contender) -> None:
    monkeypatch.setattr(case_module, "all_peers", lambda: list(peers))


def test_every_contender_passes_its_gate() -> None:
    report = run(tiny(lengths={128: 0.0}, levels=dataclasses.replace(small(), window=9)))
    status = {(row["contender"], row["precision"]): row["status"] for row in report.measurements}
    assert set(status.values()) <= {"measured", "absent"}, report.rows
    assert status["trilevel calibrated", "bfloat16"] == "measured"
    assert not report.bars
    assert report.holds


def test_the_gate_sees_the_zero_padding_that_local_attention_leaks() -> None:
    pytest.importorskip("local_attention")
    # 128 tokens are no multiple of its window of 3: its last queries attend to zero keys
    report = run(tiny(lengths={128: 0.0}, precisions=("float32",)))
    status = {row["contender"]: row["status"] for row in report.measurements}
    assert status["local-attention"] == "failed"
    assert report.holds


def test_a_wrong_contender_is_failed_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def build(problem: Problem) -> Callable[[], Tensor]:
        def call() -> Tensor:
            calls.append(1)
            return problem.value * 1.5

        return call

    with_peers(monkeypatch, dataclasses.replace(dense(), name="wrong", build=build, matches="local"))
    rows = [row for row in run(tiny(precisions=("float32",))).measurements if row["contender"] == "wrong"]
    assert rows[0]["status"] == "failed"
    assert "error" in rows[0]["reason"]
    assert "median_ms" not in rows[0]
    assert len(calls) == 2


def test_a_contender_that_raises_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(problem: Problem) -> Callable[[], Tensor]:
        raise RuntimeError("no such kernel")

    with_peers(monkeypatch, dataclasses.replace(dense(), build=build))
    row = run(tiny(precisions=("float32",))).measurements[-1]
    assert row["status"] == "failed"
    assert "no such kernel" in row["reason"]


def test_ours_failing_breaks_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(dense(), name="trilevel calibrated", rows=window_rows)
    monkeypatch.setattr(case_module, "own_variants", lambda _levels: {"calibrated": wrong})
    with_peers(monkeypatch)
    report = run(tiny(precisions=("float32",)))
    assert report.broken == ["trilevel calibrated"]
    assert not report.holds


def test_absent_and_expensive_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_peers(
        monkeypatch,
        dataclasses.replace(dense(), name="gone", package="no_such_package"),
        dataclasses.replace(dense(), name="big", peak_bytes=lambda *_: 9 * 2**30),
        dataclasses.replace(dense(), name="slow"),
    )
    rows = run(tiny(precisions=("float32",), lengths={32: 0.0, 64: 0.0}, most_seconds=1e-9)).measurements
    reasons = {(row["contender"], row["tokens"]): (row["status"], row.get("reason", "")) for row in rows}
    assert reasons["gone", 32] == ("absent", "no_such_package is not installed: pip install 'trilevel[bench]'")
    assert reasons["big", 32] == ("skipped", "predicted 9.0 GiB, limit 8 GiB")
    assert reasons["slow", 32][0] == "measured"
    assert reasons["slow", 64][0] == "skipped"
    assert "predicted" in reasons["slow", 64][1]


def row(precision: str, name: str, ms: float, matches: str | None = None, status: str = "measured") -> dict[str, Any]:
    measured = {"status": status, "median_ms": ms, "matches": matches}
    return {"precision": precision, "contender": name, "tokens": 8_192, **measured}


def test_bars_compare_each_peer_with_the_same_function() -> None:
    rows = [
        row("float32", "trilevel calibrated", 50), row("float32", "trilevel local", 20),
        row("float32", "dense SDPA", 600), row("float32", "a", 30, "local"), row("float32", "b", 400, "calibrated"),
        row("bfloat16", "trilevel calibrated", 20), row("bfloat16", "trilevel local", 9),
        row("bfloat16", "dense SDPA", 150), row("bfloat16", "a", 10, "local"),
        row("bfloat16", "b", 0.1, "calibrated", status="failed"),
    ]  # fmt: skip
    made = {bar.name: bar for bar in bars(rows)}
    assert made["blocked_fp32_vs_dense"].value == 12
    assert made["blocked_fp32_vs_dense"].holds
    assert made["blocked_bf16_vs_dense"].value == 7.5
    assert not made["blocked_bf16_vs_dense"].holds
    assert made["blocked_vs_best_peer"].value == pytest.approx(10 / 9)


def test_bars_do_not_hold_without_measurements() -> None:
    assert [bar.holds for bar in bars([])] == [False] * 3
    half = [row("float32", "a", 30, "local")]
    assert bars(half)[2].value is None


def test_digest_has_a_row_for_each_contender_and_says_what_is_missing() -> None:
    rows = [
        row("float32", "a", 30, "local") | {"tokens": 512},
        row("float32", "a", 90, "local") | {"this_over_ours": 1.5},
        row("float32", "a", 0, "local", status="skipped") | {"tokens": 32_768, "reason": "predicted 9 GiB"},
    ]
    del rows[2]["median_ms"]
    (made,) = digest(rows)
    assert (made["ms_512"], made["ms_8192"], made["ms_32768"]) == (30, 90, None)
    assert (made["this_over_ours"], made["ratios_at"], made["compared_with"]) == (1.5, 8_192, "trilevel local")
    assert made["note"] == "32768: skipped, predicted 9 GiB"
