"""`trilevel bench calibrate`: times this machine's attention over a grid and fits the cost model to it.

Every point of the grid first passes its correctness gate. Implementations run in turn; one thread is timed by its own
CPU seconds, which the turns of other programs do not lengthen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trilevel.attention import calibration
from trilevel.attention.calibration import Calibration, Key, Work
from trilevel.attention.cost import PredictedImpl, cheaper_by, work
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.bench.attention import gate_of
from trilevel.bench.contenders import Contender, dense, ours
from trilevel.bench.harness import Bar, Progress, Report, interleave
from trilevel.bench.nnls import fit_relative
from trilevel.bench.problem import Problem


def _levels() -> Levels:
    return Levels(window=33, region_size=None, num_regions=128, num_global_tokens=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateCase:
    """What is measured.

    Args:
        lengths: tokens, with the seconds of timing that all runs of a length share.
        precisions: names of torch types.
        shapes: (heads, dim) of the inputs.
        levels: of the calibrated variant; the others differ in ratio and mode alone.
        dense_tokens: longest input of dense attention, whose time grows with the square.
        keeps: store the fit for `impl="auto"` and predictions, and hold the bars to it.
    """

    lengths: Mapping[int, float] = field(default_factory=lambda: {512: 1.5, 2_048: 3.0, 8_192: 5.0, 32_768: 8.0})
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    shapes: tuple[tuple[int, int], ...] = ((8, 64), (4, 32))
    levels: Levels = field(default_factory=_levels)
    dense_tokens: int = 8_192
    keeps: bool = True

    @staticmethod
    def smoke() -> CalibrateCase:
        """The correctness gate, a glance at the clock and a fit; no bars, nothing stored."""
        return CalibrateCase(
            lengths={128: 0.0, 256: 0.0},
            shapes=((4, 32),),
            levels=Levels(window=17, region_size=None, num_regions=16, num_global_tokens=16),
            keeps=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place of the grid: a function and its sizes, which every implementation of it shares."""

    variant: str
    precision: str
    heads: int
    dim: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One thing to time: an implementation at a place of the grid."""

    impl: PredictedImpl
    levels: Levels | None
    place: Place

    @property
    def key(self) -> Key:
        """Under which its rates are fitted."""
        return self.impl, self.place.precision

    @property
    def contender(self) -> Contender:
        """What is checked and timed."""
        if self.impl == "native" or self.impl == "blocked":
            assert self.levels is not None
            return ours(f"trilevel {self.impl} {self.place.variant}", self.levels, self.impl)
        return dense()

    @property
    def work(self) -> Work:
        """What it does, for the fit."""
        place = self.place
        return work(
            self.levels, batch=1, num_heads=place.heads, num_kv_heads=place.heads, tokens=place.tokens,
            head_dim=place.dim, dtype=getattr(torch, place.precision), impl=self.impl,
        )  # fmt: skip


def variants(levels: Levels) -> dict[str, Levels]:
    """The levels of `contenders.own_variants`, by its keys."""
    alone = LevelRatio(1, 0, 0)
    return {
        "calibrated": levels,
        "strict": replace(levels, mode="strict"),
        "local+remainder": replace(levels, ratio=alone),
        "local": replace(levels, ratio=alone, mode="strict"),
    }


def run(case: CalibrateCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Measure, fit, and store the fit unless the case says not to."""
    # the longest first: malloc then keeps memory for the others, as in a process that has seen a long input
    lengths = sorted(case.lengths, reverse=True)
    corners = [(shape, precision, n) for n in lengths for shape in case.shapes for precision in case.precisions]
    found: dict[Point, dict[str, Any]] = {}
    for done, ((heads, dim), precision, tokens) in enumerate(corners):
        progress(f"{precision}, {tokens:,} tokens, {heads} heads of {dim}", done / len(corners))
        found |= _measure(case, Problem.draw(tokens, getattr(torch, precision), case.levels, heads=heads, dim=dim))
    measured = {point: row["measured_ms"] for point, row in found.items() if "measured_ms" in row}
    fitted = fit(measured)
    broken = sorted(
        {point.contender.name for point, row in found.items() if row["status"] == "failed"} - {"dense SDPA"}
    )
    if case.keeps and not broken:
        calibration.store(fitted)
    rows = judged(fitted, found)
    return Report(
        case="calibrate",
        rows=digest(rows),
        measurements=rows,
        bars=bars(rows) if case.keeps else [],
        settings=_settings(case, fitted),
        broken=broken,
    )


def fit(measured: Mapping[Point, float]) -> Calibration:
    """Rates of this machine from milliseconds."""
    rates: dict[Key, Work] = {}
    for key in dict.fromkeys(point.key for point in measured):
        own = {point: ms for point, ms in measured.items() if point.key == key}
        amounts = np.array([point.work for point in own], dtype=np.float64)
        nanoseconds = fit_relative(amounts, 1e6 * np.array(list(own.values()), dtype=np.float64))
        rates[key] = Work(*(float(value) for value in nanoseconds))
    return Calibration(machine=calibration.this_machine(), rates=rates)


def judged(fitted: Calibration, found: Mapping[Point, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their prediction, its relative error, and what `auto` costs over the best implementation."""
    rows = []
    best: dict[Place, float] = {}
    for point, row in found.items():
        if "measured_ms" in row:
            best[point.place] = min(row["measured_ms"], best.get(point.place, float("inf")))
    for point, row in found.items():
        place = point.place
        made = {"impl": point.impl, **asdict(place), **row}
        if "measured_ms" in row:
            predicted = fitted.predicted_ms(point.key, point.work)
            assert predicted is not None
            made |= {"predicted_ms": predicted, "relative_error": predicted / row["measured_ms"] - 1}
            if _chosen(fitted, point) == point.impl:
                made["auto_over_best"] = row["measured_ms"] / best[place]
        rows.append(made)
    return rows


def _chosen(fitted: Calibration, point: Point) -> str | None:
    """The implementation that `impl="auto"` runs at a point's place by these rates; None where it has no choice."""
    place = point.place
    if point.levels is None or ("native", place.precision) not in fitted.rates:
        return None
    shape = (1, place.heads, place.tokens, place.dim)
    return cheaper_by(fitted, point.levels, shape, place.heads, getattr(torch, place.precision), False)


def digest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each implementation and precision: times over the grid, and how far predictions of them are off."""
    made = []
    for impl, precision in dict.fromkeys((row["impl"], row["precision"]) for row in rows):
        own = [row for row in rows if (row["impl"], row["precision"]) == (impl, precision) and "predicted_ms" in row]
        errors, times = [abs(row["relative_error"]) for row in own], [row["measured_ms"] for row in own]
        made.append(
            {
                "implementation": impl,
                "precision": precision,
                "points": len(own),
                "fastest_ms": min(times, default=None),
                "slowest_ms": max(times, default=None),
                "median_error": statistics.median(errors) if errors else None,
                "largest_error": max(errors, default=None),
            }
        )
    return made


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """How far the predictions are off at worst, and how much `auto` loses at worst."""
    errors = [abs(row["relative_error"]) for row in rows if "relative_error" in row]
    losses = [row["auto_over_best"] for row in rows if "auto_over_best" in row]
    return [
        Bar(name="cost_model_error", value=max(errors, default=None), op="<=", bar=0.2),
        Bar(name="auto_vs_best", value=max(losses, default=None), op="<=", bar=1.1),
    ]


def _measure(case: CalibrateCase, problem: Problem) -> dict[Point, dict[str, Any]]:
    """Every point of one length, shape and precision: first the gate, then the clock."""
    heads, dim = problem.heads, problem.query.shape[3]
    found: dict[Point, dict[str, Any]] = {}
    runs: dict[str, Callable[[], object]] = {}
    points: dict[str, Point] = {}
    with torch.no_grad():
        for point in _points(case, str(problem.query.dtype).removeprefix("torch."), heads, dim, problem.tokens):
            contender = point.contender
            if (missing := contender.absence) is not None:
                found[point] = {"status": "absent", "reason": missing}
                continue
            call = contender.build(problem)
            gate = gate_of(contender, problem, call())
            found[point] = {
                "status": "measured" if gate.passed else "failed",
                "error": gate.error,
                "limit": gate.limit,
            }
            if gate.passed:
                runs[contender.name], points[contender.name] = call, point
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        timings = interleave(runs, budget_s=case.lengths[problem.tokens], warm_up=0, clock=clock)
    for name, timing in timings.items():
        found[points[name]] |= {"measured_ms": timing.median_ms, **timing.to_dict()}
    return found


def _points(case: CalibrateCase, precision: str, heads: int, dim: int, tokens: int) -> list[Point]:
    def at(variant: str) -> Place:
        return Place(variant=variant, precision=precision, heads=heads, dim=dim, tokens=tokens)

    impls: tuple[PredictedImpl, ...] = ("native", "blocked")
    points = [
        Point(impl=impl, levels=levels, place=at(name))
        for name, levels in variants(case.levels).items()
        for impl in impls
    ]  # fmt: skip
    if tokens <= case.dense_tokens:
        points.append(Point(impl="dense", levels=None, place=at("dense")))
    return points


def _settings(case: CalibrateCase, fitted: Calibration) -> dict[str, Any]:
    levels = case.levels
    return {
        "lengths": list(case.lengths),
        "shapes": [list(shape) for shape in case.shapes],
        "window": levels.window,
        "num_regions": levels.num_regions,
        "num_global_tokens": levels.num_global_tokens,
        "ratio": list(levels.ratio.shares),
        "clock": "CPU seconds of the thread" if torch.get_num_threads() == 1 else "wall",
        "calibration": fitted.to_dict(),
    }
