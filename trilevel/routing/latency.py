"""Latency tables: milliseconds of each path by batch and length, measured on one machine.

Segments are what runs, so a table holds the time from the start of a family through each of its segments; a path takes
that of its last segment, and the router's. How well this predicts is itself measured: paths are timed one by one, and
`LatencyTable.error` compares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import ConfigError, InputError
from trilevel.routing.paths import Family, Path
from trilevel.routing.steps import Arrays, Steps, rows_at_once

FORM = 1
"""Of the document; one of another form is refused."""
Floats = npt.NDArray[np.float64]
Progress = Callable[[str, float], None]
"""Told what is measured and which fraction of it is done."""
_KEYS = {"form", "machine", "batches", "lengths", "router_ms", "through_ms"}
_OTHERS = "others_ms"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatencyTable:
    """What was measured. Compared by identity.

    Args:
        machine: the machine block of what it was measured on.
        batches: sizes that were measured, rising.
        lengths: likewise.
        router_ms: (batches, lengths), of the router before the first segment; zeros where there is none.
        through_ms: by family (segments, batches, lengths), from the start through each segment.
        others_ms: by name (batches, lengths), of other models that paths are compared with.

    Raises:
        ConfigError: an axis does not rise from 1 or more, there is no family, a name is no family's, or times have
            another shape or are none.
    """

    machine: Mapping[str, Any]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    router_ms: Floats
    through_ms: Mapping[str, Floats]
    others_ms: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check axes, names and times."""
        _check_axis("batches", self.batches)
        _check_axis("lengths", self.lengths)
        cells = (len(self.batches), len(self.lengths))
        _check_times("router_ms", self.router_ms, cells, may_be_zero=True)
        if not self.through_ms:
            raise ConfigError("through_ms is empty: a latency table holds one family at least.")
        for name, times in self.through_ms.items():
            Family.parse(name)
            num_segments = len(times) if times.ndim else 0
            _check_times(f"through_ms of {name}", times, (max(1, num_segments), *cells), may_be_zero=False)
        for name, times in self.others_ms.items():
            _check_times(f"others_ms of {name}", times, cells, may_be_zero=False)

    def path_ms(self, name: str) -> Floats:
        """Milliseconds of a path (batches, lengths), with the router, or of another model, without it.

        Raises:
            ConfigError: it was not measured.
        """
        if name in self.others_ms:
            return self.others_ms[name]
        path = Path.parse(name)
        through = self.through_ms.get(path.family.name, ())
        if path.segments > len(through):
            raise self._unmeasured(f"path {name!r}")
        return np.asarray(self.router_ms + through[path.segments - 1])

    def segment_ms(self, family: str) -> Floats:
        """Milliseconds of each segment of a family alone (segments, batches, lengths).

        In a table that `measure` made with `is_whole` they may fall below 0: each depth was timed by itself.

        Raises:
            ConfigError: the family was not measured.
        """
        if family not in self.through_ms:
            raise self._unmeasured(f"family {family!r}")
        return np.diff(self.through_ms[family], axis=0, prepend=0)

    def _unmeasured(self, what: str) -> ConfigError:
        known = {family: len(times) for family, times in self.through_ms.items()}
        return ConfigError(f"{what} was not measured; families and their segments in this table: {known}.")

    def ms(self, name: str, batch: npt.ArrayLike, length: npt.ArrayLike) -> Floats:
        """Milliseconds of a path for a batch of samples of a length, linear between the measured points.

        Args:
            name: of the path.
            batch: one or an array of them.
            length: likewise; the two broadcast.

        Raises:
            ConfigError: the path was not measured, or a point lies outside of what was: attention has no slope that
                would hold there.
        """
        table = self.path_ms(name)
        row, down = _between("batch", self.batches, batch)
        column, right = _between("length", self.lengths, length)
        below, beside = np.minimum(row + 1, len(self.batches) - 1), np.minimum(column + 1, len(self.lengths) - 1)
        above = table[row, column] * (1 - right) + table[row, beside] * right
        under = table[below, column] * (1 - right) + table[below, beside] * right
        return np.asarray(above * (1 - down) + under * down)

    def dominated(self, quality: Mapping[str, float]) -> dict[str, str]:
        """Paths that nobody needs, and the path that is better than each.

        Another path is no slower at every measured point and no worse; of two that are equal in all, the first stays.
        The reference is named too where another path is as good: whoever needs it keeps it.

        Args:
            quality: of the paths to compare, by name, higher is better.

        Raises:
            ConfigError: a path was not measured, or its quality is NaN.
        """
        unknown = [name for name, value in quality.items() if np.isnan(value)]
        if unknown:
            raise ConfigError(f"quality of {', '.join(unknown)} is NaN; measure it, or leave the path out.")
        times = {name: self.path_ms(name) for name in quality}
        order = {name: place for place, name in enumerate(quality)}

        def is_better(one: str, other: str) -> bool:
            no_worse = quality[one] >= quality[other] and bool((times[one] <= times[other]).all())
            equal = quality[one] == quality[other] and bool((times[one] == times[other]).all())
            return no_worse and (not equal or order[one] < order[other])

        better = {name: [one for one in quality if is_better(one, name)] for name in quality}
        # whoever is better than the better is better too, so one of them has nobody above it
        return {name: next(one for one in found if not better[one]) for name, found in better.items() if found}

    def error(self, measured: LatencyTable) -> float:
        """How far the times of this table lie from others: of the worst path, median of |this / other - 1|.

        Args:
            measured: of the same families, depths and axes, for example by `measure` with `is_whole`.

        Raises:
            ConfigError: it is of others.
        """
        mine, others = ((t.batches, t.lengths, {n: len(x) for n, x in t.through_ms.items()}) for t in (self, measured))
        if mine != others:
            raise ConfigError(f"tables of different axes or families: {mine} and {others}; measure both alike.")
        ratios = [
            self.path_ms(path) / measured.path_ms(path)
            for name, times in self.through_ms.items()
            for path in [Family.parse(name).at(segments + 1).name for segments in range(len(times))]
        ]
        return max(float(np.median(np.abs(ratio - 1))) for ratio in ratios)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` gives an equal table back."""
        return {
            "form": FORM,
            "machine": dict(self.machine),
            "batches": list(self.batches),
            "lengths": list(self.lengths),
            "router_ms": self.router_ms.tolist(),
            "through_ms": {name: times.tolist() for name, times in self.through_ms.items()},
            _OTHERS: {name: times.tolist() for name, times in self.others_ms.items()},
        }

    @classmethod
    def from_dict(cls, document: Any) -> LatencyTable:
        """What `to_dict` made.

        Raises:
            InputError: it has another form, a key is missing or unknown, or a value is not what it must be.
        """
        if not isinstance(document, dict) or document.get("form") != FORM:
            raise InputError(f"this is no latency table of form {FORM}. Measure it again.")
        wrong = sorted((set(document) - {_OTHERS}) ^ _KEYS)
        if wrong:
            raise InputError(f"latency table: keys {wrong} are unknown or missing. Measure it again.")
        machine, through, others = document["machine"], document["through_ms"], document.get(_OTHERS, {})
        if not all(isinstance(one, dict) for one in (machine, through, others)):
            raise InputError(f"latency table: machine, through_ms and {_OTHERS} must be objects. Measure it again.")
        try:
            return cls(
                machine=machine,
                batches=_axis(document["batches"]),
                lengths=_axis(document["lengths"]),
                router_ms=_times(document["router_ms"]),
                through_ms={name: _times(times) for name, times in through.items()},
                others_ms={name: _times(times) for name, times in others.items()},
            )
        except (TypeError, ValueError) as error:
            raise InputError(f"latency table: {error} Measure it again.") from error


def _check_axis(name: str, values: tuple[int, ...]) -> None:
    if not values or values[0] < 1 or list(values) != sorted(set(values)):
        raise ConfigError(f"{name}={list(values)} must rise from 1 or more, and hold one at least.")


def _check_times(name: str, times: Floats, shape: tuple[int, ...], *, may_be_zero: bool) -> None:
    is_right = times.shape == shape and np.isfinite(times).all() and (times >= 0).all()
    if not is_right or not (may_be_zero or times.all()):
        bound = ">= 0" if may_be_zero else "> 0"
        raise ConfigError(f"{name} must be finite times {bound} of shape {shape}; it is {times.tolist()}.")


def _axis(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TypeError(f"an axis is {values}, not a list of whole numbers.")
    return tuple(values)


def _times(values: Any) -> Floats:
    times = np.asarray(values)
    if times.dtype.kind not in "if":
        raise TypeError(f"times are {values}, not numbers.")
    return times.astype(np.float64)


def _between(name: str, axis: tuple[int, ...], values: npt.ArrayLike) -> tuple[npt.NDArray[np.intp], Floats]:
    """The place in an axis before each value, and how far it lies towards the next."""
    values = np.asarray(values, dtype=np.float64)
    outside = values[~((values >= axis[0]) & (values <= axis[-1]))]
    if outside.size:
        raise ConfigError(
            f"{name}={outside.flat[0]:g} lies outside of what was measured, {axis[0]} to {axis[-1]}. Measure there too."
        )
    places = np.interp(values, axis, np.arange(len(axis)))
    low = np.floor(places).astype(np.intp)
    return low, places - low


def measure(
    steps: Mapping[str, Steps],
    inputs: Callable[[int, int], Arrays],
    *,
    batches: Sequence[int],
    lengths: Sequence[int],
    machine: Mapping[str, Any],
    router: Callable[[Arrays], object] | None = None,
    others: Mapping[str, Callable[[Arrays], object]] | None = None,
    is_whole: bool = False,
    budget_s: float = 60.0,
    warm_up: int = 1,
    min_rounds: int = 3,
    max_rounds: int = 50,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time segments at every batch and length: medians of rounds, each of which runs everything once.

    All families take their turn at a point before the next point is measured, so a disturbance of the machine meets all
    of them alike.

    Args:
        steps: by the name of their family.
        inputs: of segment 0, for a batch and a length.
        batches: to measure, rising.
        lengths: to measure, rising.
        machine: the machine block, which the table keeps.
        router: what runs before segment 0, on its inputs.
        others: other models on the same inputs, by name.
        is_whole: time each path by itself, from the first segment to its last, for `LatencyTable.error`; else all
            depths of a family in one pass.
        budget_s: no round begins after so many seconds, once there are `min_rounds`.
        warm_up: rounds before, which are not counted.
        min_rounds: fewest rounds, whatever they take.
        max_rounds: most rounds.
        clock: in seconds.
        progress: told of each point.

    Raises:
        ConfigError: an axis, a family's name or a number of rounds is wrong, or there is no family.
    """
    if not steps:
        raise ConfigError("there are no steps to measure; give those of one family at least.")
    # a name that the table would refuse is better refused now
    for name in steps:
        Family.parse(name)
    _check_axis("batches", tuple(batches))
    _check_axis("lengths", tuple(lengths))
    if not 1 <= min_rounds <= max_rounds:
        raise ConfigError(f"min_rounds={min_rounds} must be 1 to max_rounds={max_rounds}.")
    # a batch that runs in pieces takes as long as its pieces, so one of them is measured
    cells = [(min(batch, rows_at_once(length)), length) for batch in batches for length in lengths]
    points = {(batch, length): inputs(batch, length) for batch, length in dict.fromkeys(cells)}
    point = partial(_point, steps, router, list((others or {}).values()), is_whole, clock)
    for _ in range(warm_up):
        for arrays in points.values():
            point(arrays)
    start = clock()
    rounds: list[list[list[float]]] = []
    while len(rounds) < min_rounds or (len(rounds) < max_rounds and clock() - start < budget_s):
        rounds.append([])
        for (batch, length), arrays in points.items():
            if progress is not None:
                done = len(rounds) - 1 + len(rounds[-1]) / len(points)
                spent = (clock() - start) / budget_s if budget_s > 0 else 1.0
                progress(f"batch {batch}, length {length}", max(done / max_rounds, min(spent, done / min_rounds, 1.0)))
            rounds[-1].append(point(arrays))
    # first the router, then the segments of all families, then others
    found = dict(zip(points, 1e3 * np.median(rounds, axis=0), strict=True))
    ms = np.array([found[cell] for cell in cells]).T.reshape(-1, len(batches), len(lengths))
    ms *= np.array(batches)[:, None] / np.array([batch for batch, _ in cells]).reshape(len(batches), len(lengths))
    *segments, rest = np.split(ms[1:], np.cumsum([own.num_segments for own in steps.values()]))
    return LatencyTable(
        machine=machine,
        batches=tuple(batches),
        lengths=tuple(lengths),
        router_ms=ms[0],
        through_ms=dict(zip(steps, segments, strict=True)),
        others_ms=dict(zip(others or {}, rest, strict=True)),
    )


def _point(
    steps: Mapping[str, Steps],
    router: Callable[[Arrays], object] | None,
    others: Sequence[Callable[[Arrays], object]],
    is_whole: bool,
    clock: Callable[[], float],
    arrays: Arrays,
) -> list[float]:
    """Seconds of the router, then through each segment of each family, then of others."""
    seconds = [0.0 if router is None else _seconds(router, arrays, clock)]
    for own in steps.values():
        if is_whole:
            seconds += [_through(own, arrays, depth, clock)[-1] for depth in range(1, own.num_segments + 1)]
        else:
            seconds += _through(own, arrays, own.num_segments, clock)
    return seconds + [_seconds(other, arrays, clock) for other in others]


def _seconds(run: Callable[[Arrays], object], arrays: Arrays, clock: Callable[[], float]) -> float:
    start = clock()
    run(arrays)
    return clock() - start


def _through(steps: Steps, arrays: Arrays, depth: int, clock: Callable[[], float]) -> list[float]:
    start, seconds = clock(), []
    for segment in range(depth):
        arrays, _ = steps.run(segment, arrays)
        seconds.append(clock() - start)
    return seconds
