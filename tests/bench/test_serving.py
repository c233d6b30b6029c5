"""`trilevel bench serving`: batches that know no paths, figures, bars; the command, faults and a soak when slow."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.serving.fake_model import router
from trilevel.artifact.routed import paths_of
from trilevel.bench.serving import environments
from trilevel.bench.serving.blind import BlindRunner
from trilevel.bench.serving.case import ServingCase, parse_task
from trilevel.bench.serving.faults import measure_faults
from trilevel.bench.serving.goodput import AWARE, Contender, Goodput
from trilevel.bench.serving.load import Load, run_load
from trilevel.bench.serving.own import EngineSpec, start_engine
from trilevel.bench.serving.pressure import Memory, Pressure, press, pressure_bars
from trilevel.bench.serving.process import free_ports
from trilevel.bench.serving.trivial import (
    INPUT,
    NAME,
    is_right,
    open_inference_grpc,
    open_inference_json,
    rows,
    weights,
    write_trivial,
)
from trilevel.bench.serving.workload import Workload
from trilevel.cli.bench import app
from trilevel.errors import InputError
from trilevel.routing.certificate import Platform
from trilevel.routing.router import Rule
from trilevel.serving.requests import Arrays


class Steps:
    """Segments whose margin says behind which one a row leaves; counts the rows that it ran."""

    def __init__(self, name: str) -> None:
        self.name, self.ran = name, list[tuple[int, int]]()

    def run(self, segment: int, arrays: Arrays) -> tuple[dict[str, Any], Any]:
        depth = np.asarray(arrays["depth"])
        self.ran.append((segment, len(depth)))
        margin = np.where((depth <= segment) | (self.name == "float32"), 9.0, 0.5)
        best = 10.0 * segment + (100.0 if self.name == "float32" else 0.0) + np.arange(len(depth))
        return dict(arrays), np.stack([best, best - margin, best - margin - 1], 1)


def blind(depths: Sequence[int]) -> tuple[Any, dict[str, Steps]]:
    steps = {name: Steps(name) for name in ("int8", "float32")}
    platform = Platform(runtime="onnxruntime", version="1", isa="avx2", precision="float32")
    own: Any = SimpleNamespace(
        paths=paths_of(router()), steps=steps, platform=platform, features=lambda arrays: np.zeros((len(depths), 4))
    )
    rule = Rule(router=router(), setting={"int8/start": 0.5, "int8/1": 2.0, "int8/2": 2.0})
    runner = BlindRunner(own, rule, "logits")
    state, _ = runner.run("float32", 0, {"depth": np.array(depths)})
    _, outputs = runner.run("float32", 1, state)
    return outputs["logits"][:, 0], steps


def test_blind_batches_pay_for_their_deepest_row_and_answer_like_paths() -> None:
    best, steps = blind([0, 0, 0])
    assert best.tolist() == [0, 1, 2]
    assert (steps["int8"].ran, steps["float32"].ran) == ([(0, 3)], [])
    best, steps = blind([0, 1, 0])
    assert best.tolist() == [0, 11, 2]
    assert steps["int8"].ran == [(0, 3), (1, 3)]
    # one row that needs the full path takes all others with it
    best, steps = blind([0, 1, 2])
    assert best.tolist() == [0, 11, 102]
    assert (steps["int8"].ran, steps["float32"].ran) == ([(0, 3), (1, 3)], [(0, 3)])


def load(latencies: Sequence[float], *, seconds: float = 1.0, status: int = 200) -> Load:
    count = len(latencies)
    at = np.linspace(0, seconds, count)
    return Load(
        intended=at,
        sent=at,
        done=at + np.array(latencies),
        status=np.full(count, status),
        body=np.zeros(count, np.int64),
        seconds=seconds,
    )


def test_bars_take_the_worst_and_what_was_not_measured_does_not_hold() -> None:
    def of(rate: int, memory: list[int]) -> Pressure:
        return Pressure(
            workload="w", name="n", load=load([0.05] * rate), memory=Memory(memory), slo_s=0.1, peak=20.0
        )  # fmt: skip

    flat, grown = [100] * 25, [100] * 15 + [110] * 10
    bars = {bar.name: bar for bar in pressure_bars([of(19, flat), of(17, grown)], [], has_soak=True)}
    assert bars["overload_goodput_share"].value == pytest.approx(0.85)
    assert bars["overload_p99_of_deadline"].value == pytest.approx(0.5)
    assert bars["overload_memory_ratio"].value == pytest.approx(1.1)
    assert bars["soak_memory_ratio"].value is None
    assert [bar.holds for bar in bars.values()] == [False, True, False, False]
    assert len(pressure_bars([], [], has_soak=False)) == 3
    assert Memory([1, 2]).ratio is None


def test_ratios_of_goodput() -> None:
    found = [{"server": name, "goodput": value} for name, value in ((AWARE, 30.0), ("a 4", 10.0), ("a 8", 15.0))]
    goodput = Goodput(rows=found, broken=[])
    assert goodput.ratio("a") == 2.0
    assert goodput.ratio("z") is None


def test_a_ladder_of_rates_ends_behind_its_top() -> None:
    nothing: Any = SimpleNamespace(name="w")
    one = Contender(name="x", server=nothing, workload=nothing, slo_s=0.1)
    for rate, value in ((1.0, 1.0), (2.0, 2.0), (3.0, 1.9)):
        one.seen[rate] = value
        assert not one.is_over
    one.seen[4.0] = 1.0
    assert not one.is_over
    one.seen[5.0] = 1.0
    assert one.is_over
    assert (one.goodput, one.row()["at_rate"]) == (2.0, 2.0)


def test_requests_of_the_trivial_model_differ_and_their_answers_are_checked() -> None:
    pytest.importorskip("google.protobuf")
    x = rows(700)
    assert len({row.tobytes() for row in x}) == 700
    for bodies in (open_inference_json(x), open_inference_grpc(x)):
        assert len(set(bodies)) == 700
    y = x @ weights()
    replies = [json.dumps({"outputs": [{"data": row.tolist()}]}).encode() for row in y]
    assert is_right([3, 5], [replies[3], replies[5]], x, "rest")
    assert not is_right([3, 5], [replies[5], replies[3]], x, "rest")
    assert not is_right([3], [b'{"error": "no"}'], x, "rest")
    assert not is_right([], [], x, "rest")


def test_peers_that_cannot_be_had_are_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path))
    found, absent = environments.find(["kserve"], make=False)
    assert (found, absent) == ([], {"kserve": "it is not installed; --peers installs it"})

    def fails(*command: str) -> None:
        raise OSError("pip said no matching distribution")

    monkeypatch.setattr(environments, "_run", fails)
    found, absent = environments.find(["triton"], make=True)
    assert (found, absent) == ([], {"triton": "it cannot be installed: pip said no matching distribution"})
    assert not list((tmp_path / "peers").iterdir())
    with pytest.raises(InputError, match=r"no peer 'x'; known are litserve, kserve, triton"):
        environments.find(["x"], make=False)


def test_options_as_they_are_written() -> None:
    assert parse_task("a=b.npz") == (Path("a"), Path("b.npz"))
    assert parse_task("a") == (Path("a"), None)
    with pytest.raises(InputError, match="write ARTIFACT=DATA"):
        parse_task("a=")
    with pytest.raises(InputError, match=r"--part speed is unknown; choose from cost, goodput, faults"):
        ServingCase(parts=("cost", "speed"))


@pytest.fixture
def trivial(tmp_path: Path) -> Path:
    for module in ("onnx", "onnxruntime", "uvicorn"):
        pytest.importorskip(module)
    return write_trivial(tmp_path / NAME).path


@pytest.mark.slow
def test_nothing_is_lost_when_workers_die_models_change_and_servers_end(tmp_path: Path, trivial: Path) -> None:
    found = measure_faults(tmp_path, lambda what, share: None, kills=4, reloads=3, drains=2, rate=60.0)
    assert [one.times for one in found] == [4, 3, 2]
    assert all(one.requests > 50 for one in found)
    assert [(one.lost, one.twice) for one in found] == [(0, 0)] * 3
    # those that ran in a worker that was killed are tried again
    assert all(set(one.errors) <= {"500", "503", "not accepted"} for one in found)


@pytest.mark.slow
def test_memory_does_not_grow(trivial: Path) -> None:
    (port,) = free_ports(1)
    server = start_engine(EngineSpec(folder=str(trivial), name=NAME, port=port))
    x = rows(512)
    workload = Workload(
        name=NAME,
        folder=trivial,
        runtime="onnxruntime",
        inputs=[{INPUT: row[None]} for row in x],
        answers=[row[None] for row in x @ weights()],
        paths=[""] * len(x),
        full_ms=1.0,
        easy_share=None,
        limit=0.0,
    )
    try:
        one = Contender(name=AWARE, server=server, workload=workload, slo_s=5.0)
        spec = one.spec(connections=8, seconds=2.0, keeps=True)
        seen = run_load(spec, workload.bodies)
        assert seen.is_ok.all()
        assert not workload.wrong(seen.body.tolist(), seen.replies, with_paths=False)
        assert workload.wrong([1], [seen.replies[seen.body.tolist().index(0)]], with_paths=False)
        one.seen[1.0] = 100.0
        # some seconds to fill what is filled once
        press(one, "warm", 150.0, 10.0, lambda what, share: None)
        minutes = float(os.environ.get("TRILEVEL_SOAK_MINUTES", "0.5"))
        found = press(one, "soak", 150.0, 60 * minutes, lambda what, share: None)
    finally:
        server.kill()
    assert found.load.num_lost == 0
    assert found.memory.ratio is not None
    assert found.memory.ratio <= 1.02


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_smoke_of_the_whole_command(tmp_path: Path, trivial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["serving", "--smoke", "--json"])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("is left out: it is not installed; --peers installs it") == 3
    document = json.loads(result.stdout.splitlines()[-1])
    assert (document["case"], document["bars"], document["broken"]) == ("serving", [], [])
    assert set(document["settings"]["absent"]) == {"litserve", "kserve", "triton"}
    figures = {row["what"]: row["value"] for row in document["rows"]}
    assert figures["processor time a request, rest, 16 connections"] > 0
    assert figures["p50 of one client, grpc"] > 0
    assert all(value == 0 for what, value in figures.items() if what.endswith((": lost", "wrongly")))
