"""What every bench case shares: the correctness gate, interleaved timing, bars, and the document that comes out.

A contender is first checked against its own definition, computed in float64; one that fails is reported as failed and
never timed. The others run in turn (A B C A B C ...), so that a disturbance of the machine meets all of them.
"""

from __future__ import annotations

import json
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trilevel.errors import InputError

Operator = Literal[">=", ">", "<=", "<"]
COMPARE: dict[Operator, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
LARGEST_LIMIT = 0.1
"""A relative error above this is a wrong answer in any precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A promise with a number: `value op bar`. A value of None was not measured, so the bar does not hold."""

    name: str
    value: float | None
    op: Operator
    bar: float

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.value is not None and COMPARE[self.op](self.value, self.bar)

    def to_dict(self) -> dict[str, Any]:
        """The bar as it stands in the JSON document."""
        return {"name": self.name, "value": self.value, "op": self.op, "bar": self.bar, "holds": self.holds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Outcome of a correctness check: relative L2 error against float64, and the limit that the precision allows."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the contender computes what it says it computes (NaN fails)."""
        return self.error <= self.limit


def check(output: Tensor, exact: Tensor, rounded: Tensor) -> Gate:
    """Compare an output with its float64 definition.

    The limit is not tuned by hand: twice the error of `rounded`, the same definition computed eagerly in the
    contender's precision, plus one rounding step of its output (FlashAttention's test rule), never above
    `LARGEST_LIMIT`.

    Args:
        output: what the contender gives, any shape.
        exact: the definition in float64, same shape.
        rounded: the definition in the contender's precision, same shape.
    """
    if output.shape != exact.shape:
        return Gate(error=float("inf"), limit=LARGEST_LIMIT)
    limit = 2 * _relative_error(rounded, exact) + torch.finfo(output.dtype).eps
    return Gate(error=_relative_error(output, exact), limit=min(limit, LARGEST_LIMIT))


def _relative_error(value: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return float((value.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of every repeat of one contender."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median, in milliseconds."""
        return 1e3 * statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Median, extremes and number of repeats."""
        return {
            "median_ms": self.median_ms,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "repeats": len(self.seconds),
        }


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    min_repeats: int = 3,
    max_repeats: int = 50,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the contenders in turn, A B C A B C ..., warm-up rounds first.

    Every contender gets `min_repeats`; further rounds go to those that have not used up their share of `budget_s`, up
    to `max_repeats`, so a slow one does not take the repeats of a fast one.
    """
    for _ in range(warm_up):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    share = budget_s / max(1, len(runs))
    while True:
        due = [n for n, spent in seconds.items() if _wants_more(spent, share, min_repeats, max_repeats)]
        if not due:
            return {name: Timing(seconds=tuple(spent)) for name, spent in seconds.items()}
        for name in due:
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)


def _wants_more(spent: Sequence[float], share: float, min_repeats: int, max_repeats: int) -> bool:
    return len(spent) < min_repeats or (len(spent) < max_repeats and sum(spent) < share)


Progress = Callable[[str, float], None]
"""Told what a case is doing and which fraction of it is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a case measured: rows of a table, bars, and the settings they were measured with.

    `measurements` holds the single measurements where the rows are a digest of them. `broken` names parts of our own
    that failed their correctness gate; with one of them nothing holds.
    """

    case: str
    rows: list[dict[str, Any]]
    bars: list[Bar] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every bar holds and nothing of ours is broken."""
        return not self.broken and all(bar.holds for bar in self.bars)

    def to_dict(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The JSON document: case, machine, settings, rows, bars, measurements, broken."""
        return {
            "case": self.case,
            "machine": machine,
            "settings": self.settings,
            "rows": self.rows,
            "bars": [bar.to_dict() for bar in self.bars],
            "measurements": self.measurements,
            "broken": self.broken,
        }


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document atomically (temporary file, fsync, rename).

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}). Give --out a file in a writable folder.") from error
