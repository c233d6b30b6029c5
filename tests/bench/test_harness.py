"""The harness: a wrong contender is refused, runs interleave, medians and bars are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from trilevel.bench.harness import LARGEST_LIMIT, Bar, Report, Timing, check, interleave, write_json
from trilevel.bench.memory import peak_memory_bytes
from trilevel.errors import ImplementationError, InputError


class Clock:
    """A clock that only advances when a contender says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def read(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> None:
        self.order.append(name)
        self.now += seconds


def test_gate_passes_rounding_and_refuses_another_function() -> None:
    torch.manual_seed(0)
    exact = torch.randn(7, 11, dtype=torch.float64)
    rounded = exact.bfloat16()
    assert check(rounded, exact, rounded).passed
    assert not check(rounded * 1.05, exact, rounded).passed
    assert not check(exact.float() + 1e-4, exact, exact.float()).passed


def test_gate_refuses_nan_a_wrong_shape_and_a_lenient_reference() -> None:
    exact = torch.ones(5, 3, dtype=torch.float64)
    assert not check(torch.full((5, 3), math.nan), exact, exact.float()).passed
    assert not check(torch.ones(3, 5), exact, exact.float()).passed
    far_off = check(torch.full((5, 3), 1.2), exact, torch.full((5, 3), 3.0))
    assert far_off.limit == LARGEST_LIMIT
    assert not far_off.passed


def test_runs_interleave_after_the_warm_up() -> None:
    clock = Clock()
    runs = {name: lambda name=name: clock.run(name, 1.0) for name in "abc"}
    interleave(runs, budget_s=0, min_repeats=2, warm_up=1, clock=clock.read)
    assert clock.order == list("abc" * 3)


def test_repeats_adapt_to_the_budget() -> None:
    clock = Clock()
    runs = {"slow": lambda: clock.run("slow", 5.0), "fast": lambda: clock.run("fast", 0.5)}
    timings = interleave(runs, budget_s=8.0, min_repeats=3, max_repeats=6, warm_up=0, clock=clock.read)
    assert len(timings["slow"].seconds) == 3
    assert len(timings["fast"].seconds) == 6
    assert timings["fast"].median_ms == pytest.approx(500)


def test_timing_gives_the_median_and_the_extremes() -> None:
    timing = Timing(seconds=(0.003, 0.001, 0.011))
    assert timing.to_dict() == {
        "median_ms": pytest.approx(3),
        "min_ms": pytest.approx(1),
        "max_ms": pytest.approx(11),
        "repeats": 3,
    }


@pytest.mark.parametrize(
    ("value", "op", "holds"),
    [
        (2.0, ">=", True),
        (1.9, ">=", False),
        (2.0, ">", False),
        (2.0, "<=", True),
        (2.0, "<", False),
        (None, ">=", False),
    ],
)
def test_bars(value: float | None, op: str, holds: bool) -> None:
    bar = Bar(name="b", value=value, op=op, bar=2.0)  # type: ignore[arg-type]
    assert bar.holds is holds
    assert bar.to_dict() == {"name": "b", "value": value, "op": op, "bar": 2.0, "holds": holds}


def test_nan_holds_no_bar() -> None:
    assert not Bar(name="b", value=math.nan, op="<=", bar=1.0).holds


def test_report_holds_when_all_bars_do() -> None:
    good, bad = (Bar(name=str(value), value=value, op=">=", bar=2.0) for value in (3.0, 1.0))
    assert Report(case="x", rows=[], bars=[good]).holds
    assert not Report(case="x", rows=[], bars=[good, bad]).holds
    document = Report(case="x", rows=[{"a": 1}], bars=[bad]).to_dict({"cpu": "c"})
    assert list(document) == ["case", "machine", "settings", "rows", "bars", "measurements", "broken"]


def test_document_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "case.json"
    write_json(path, {"rows": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"rows": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["case.json"]
    with pytest.raises(InputError, match="--out"):
        write_json(path / "below-a-file.json", {})


def test_memory_counts_the_call_and_not_its_inputs() -> None:
    # 1,024 tokens: the mask is 1 MiB as bool and 4 MiB as float, the output 2 MiB
    peak = peak_memory_bytes("trilevel.bench.attention:call_by_name", "masked SDPA", 1_024, timeout_s=100)
    assert 4 * 2**20 < peak < 64 * 2**20


def test_a_failing_or_slow_process_is_told() -> None:
    with pytest.raises(ImplementationError, match="failed in its process"):
        peak_memory_bytes("math:sqrt", -1)
    with pytest.raises(ImplementationError, match="Raise timeout_s"):
        peak_memory_bytes("time:sleep", 30, timeout_s=0.5)
