"""Batched execution of a decision rule: samples leave behind segments, the others go on in smaller arrays.

Samples of one family and length wait in a queue before each segment. The deepest queue that fills a batch runs next;
when none does, the shallowest, so that its survivors join those that wait deeper. Each segment thus runs in the fewest
batches possible, no batch pays for its deepest member, and at most `(segments - 1) * (max_batch - 1) + max_batch` rows
of state are held. Samples that restart join those that begin with the full path.

A sample's answer depends on the others of its batch by the runtime's rounding alone. A margin that lies nearer to its
threshold than that rounding may fall on the other side of it in another batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from trilevel.errors import ConfigError, ImplementationError, ShapeError
from trilevel.routing.paths import Family, Path, PathSet
from trilevel.routing.steps import Array, Arrays, Steps

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.intp]
Sample = TypeVar("Sample")


class Verdict(NamedTuple):
    """What a rule says of samples behind a segment.

    Args:
        leave: (samples,), whether the answer of this segment's head is the sample's.
        margin: (samples,), how sure the head is; kept for explanations.
    """

    leave: Flags
    margin: Floats


class Decider(Protocol):
    """A decision rule: which family a sample begins with, and behind which segment it leaves."""

    def start(self, features: Floats) -> Sequence[str]:
        """What each sample begins with, of features (samples, features).

        A family's name, or the name of the full path, which then runs to its end and is asked nothing.
        """
        ...

    def after(self, family: str, segment: int, outputs: Array, features: Floats) -> Verdict:
        """Which samples leave behind a segment where a path of their family ends.

        Those that do not leave behind the deepest path take the full one from its beginning. Behind the full path all
        leave, unasked.

        Args:
            family: its name.
            segment: from 0, the one that has just run.
            outputs: (samples, segment + 1, ...), of the heads behind all segments so far; `outputs[:, -1]` is the last.
            features: (samples, features), as `start` saw them.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routed:
    """What a sample got.

    Args:
        outputs: (segments, ...), of the heads behind all segments of its path.
        path: the name of the path that answered.
        segments_run: of its path, and of the family that it left for the full path.
        margin: the rule's, of the answer; NaN where it was not asked.
    """

    outputs: Array
    path: str
    segments_run: int
    margin: float

    @property
    def output(self) -> Array:
        """The answer: of the last head."""
        answer: Array = self.outputs[-1]
        return answer

    @property
    def is_restarted(self) -> bool:
        """Whether it passed a whole family before it took the full path."""
        return self.segments_run > len(self.outputs)


class BatchRun(NamedTuple):
    """One batch that ran: `seconds` of the segment alone, without collating and deciding."""

    family: str
    segment: int
    batch: int
    length: int
    seconds: float


class BatchError(ImplementationError):
    """Batches failed. All others ran to their end first.

    Attributes:
        failed: the exception of each sample that has no answer, by its place in the input.
        routed: in input order, None for those.
    """

    def __init__(self, failed: Mapping[int, Exception], routed: Sequence[Routed | None]) -> None:
        self.failed, self.routed = dict(failed), list(routed)
        place, error = next(iter(self.failed.items()))
        super().__init__(
            f"{len(failed)} of {len(routed)} samples have no answer, because their batches failed: "
            f"{', '.join(map(str, sorted(failed)))}. Sample {place}: {type(error).__name__}: {error}. The answers of "
            "the others are in `routed` of this exception."
        )


def execute(
    samples: Sequence[Sample],
    steps: Mapping[str, Steps],
    paths: PathSet,
    decider: Decider | None,
    *,
    max_batch: int,
    length_of: Callable[[Sample], int],
    collate: Callable[[Sequence[Sample], int], Arrays],
    features: Floats | None = None,
    on_batch: Callable[[BatchRun], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Routed]:
    """Run samples as a rule says; answers in input order.

    Args:
        samples: of any kind that `collate` takes.
        steps: by the name of their family, for all families of the paths.
        paths: a sample leaves only where one of them ends.
        decider: the rule; None runs the full path for all.
        max_batch: most samples that run at once.
        length_of: the length that a sample is padded to; those of one length share batches. Its own length, or that
            rounded up, for fewer and fuller batches.
        collate: makes the inputs of segment 0 from samples and the length that all of them have.
        features: (samples, features) for the rule; None for a rule that reads none.
        on_batch: told of each batch that ran.
        clock: in seconds.

    Raises:
        ConfigError: a path has no steps or fewer than it needs, the rule begins with something else than a family or
            the full path, or max_batch < 1.
        ShapeError: there are not as many features as samples.
        BatchError: batches failed, for example because `collate` did not pad to the length.
    """
    if max_batch < 1:
        raise ConfigError(f"max_batch={max_batch} must be >= 1.")
    if features is None:
        features = np.empty((len(samples), 0))
    if len(features) != len(samples):
        raise ShapeError(f"features has {len(features)} rows for {len(samples)} samples; give one row for each.")
    _check_steps(steps, paths)
    run = _Execution(
        samples=samples, steps=steps, decider=decider, max_batch=max_batch, collate=collate, features=features,
        on_batch=on_batch, clock=clock,
    )  # fmt: skip
    routes, full = routes_of(paths), paths.full.name
    begun = _begin(decider, features, full, routes)
    lengths = [length_of(sample) for sample in samples]
    groups: dict[tuple[str, int], list[int]] = {}
    for row, group in enumerate(zip(begun, lengths, strict=True)):
        groups.setdefault(group, []).append(row)
    last = {length: groups.pop((full, length), []) for length in sorted(set(lengths))}
    for (name, length), rows in groups.items():
        last[length] += run.finish(routes[name], length, rows)
    for length, rows in last.items():
        run.finish(routes[full], length, rows)
    return run.answers()


def run_path(
    samples: Sequence[Sample],
    steps: Steps,
    path: Path,
    *,
    max_batch: int,
    length_of: Callable[[Sample], int],
    collate: Callable[[Sequence[Sample], int], Arrays],
    on_batch: Callable[[BatchRun], None] | None = None,
) -> Array:
    """Run one path for all samples: outputs (samples, segments, ...) of the heads behind all its segments.

    Args:
        samples: at least one.
        steps: of the path's family.
        path: what to run.
        max_batch: see `execute`, as are the others.

    Raises:
        ConfigError: there are no samples, or the path is deeper than the steps.
        ShapeError: outputs differ in shape between samples; `execute` without a rule takes these.
        BatchError: batches failed.
    """
    if not len(samples):
        raise ConfigError("there are no samples to run; give at least one.")
    routed = execute(
        samples, {path.family.name: steps}, PathSet(paths=(path,), full=path), None, max_batch=max_batch,
        length_of=length_of, collate=collate, on_batch=on_batch,
    )  # fmt: skip
    shapes = sorted({one.outputs.shape for one in routed})
    if len(shapes) > 1:
        raise ShapeError(f"outputs differ in shape between samples: {shapes}. Use execute(..., decider=None).")
    return np.stack([one.outputs for one in routed])


def _check_steps(steps: Mapping[str, Steps], paths: PathSet) -> None:
    have = {name: own.num_segments for name, own in steps.items()}
    short = [path.name for path in paths if path.segments > have.get(path.family.name, 0)]
    if short:
        raise ConfigError(f"there are no steps for the paths {', '.join(short)}; families and their segments: {have}.")


class Route(NamedTuple):
    """What a sample takes: segments of a family up to `last`, and the depths behind which the rule is asked."""

    family: str
    asked: tuple[int, ...]
    last: int

    def path(self, segment: int, full: str) -> str:
        """The name of the path that ends behind a segment, numbered from 0; `full` where nobody is asked."""
        return Family.parse(self.family).at(segment + 1).name if self.asked else full


def routes_of(paths: PathSet) -> dict[str, Route]:
    """By what a rule may name: the families, and at the end the full path, behind which nobody is asked."""
    full = paths.full
    asked = {
        name: tuple(depth for depth in depths if name != full.family.name or depth < full.segments)
        for name, depths in paths.families.items()
    }
    routes = {name: Route(name, asked[name], depths[-1]) for name, depths in paths.families.items()}
    return routes | {full.name: Route(full.family.name, (), full.segments)}


def _begin(decider: Decider | None, features: Floats, full: str, known: Collection[str]) -> Sequence[str]:
    """The name of the route that each sample begins with."""
    if decider is None or not len(features):
        return [full] * len(features)
    chosen = decider.start(features)
    unknown = sorted(set(chosen) - set(known))
    if unknown or len(chosen) != len(features):
        raise ConfigError(
            f"the rule named {len(chosen)} beginnings for {len(features)} samples, unknown ones: {unknown}; it must "
            f"name one for each, of {', '.join(known)}."
        )
    return chosen


class _Waiting(NamedTuple):
    """Samples before a segment; the state of those before the first is empty."""

    rows: Rows
    state: Arrays

    def split(self, count: int) -> tuple[_Waiting, _Waiting]:
        """The first `count`, and a copy of the rest, so that it does not keep all of them in memory."""
        first = {name: array[:count] for name, array in self.state.items()}
        rest = {name: array[count:].copy() for name, array in self.state.items()}
        return _Waiting(self.rows[:count], first), _Waiting(self.rows[count:], rest)

    def joined(self, other: _Waiting) -> _Waiting:
        """With others behind them."""
        if not len(self.rows) or not len(other.rows):
            return self if len(self.rows) else other
        shapes, others = ({name: a.shape[1:] for name, a in one.state.items()} for one in (self, other))
        if shapes != others:
            raise ShapeError(f"states of one length differ in shape: {shapes} and {others}. Let collate pad to it.")
        state = {name: np.concatenate([array, other.state[name]]) for name, array in self.state.items()}
        return _Waiting(np.concatenate([self.rows, other.rows]), state)


_NOBODY = _Waiting(np.empty(0, dtype=np.intp), {})


@dataclass(slots=True, kw_only=True)
class _Execution(Generic[Sample]):
    """One call of `execute`."""

    samples: Sequence[Sample]
    steps: Mapping[str, Steps]
    decider: Decider | None
    max_batch: int
    collate: Callable[[Sequence[Sample], int], Arrays]
    features: Floats
    on_batch: Callable[[BatchRun], None] | None
    clock: Callable[[], float]
    # outputs of each sample's segments so far, on the route that it takes
    said: dict[int, list[Array]] = field(default_factory=dict)
    # segments that ran before for those that restarted
    lost: dict[int, int] = field(default_factory=dict)
    routed: dict[int, Routed] = field(default_factory=dict)
    failed: dict[int, Exception] = field(default_factory=dict)

    def finish(self, route: Route, length: int, rows: Sequence[int]) -> list[int]:
        """Run all samples of a route and length, and give back those that restart.

        A batch that fails takes its own samples with it, no others.
        """
        queues = [_Waiting(np.array(rows, dtype=np.intp), {})] + [_NOBODY] * route.last
        while (segment := self._next(queues[:-1])) is not None:
            batch, queues[segment] = queues[segment].split(self.max_batch)
            try:
                survivors = self._step(route, segment, length, batch)
                queues[segment + 1] = queues[segment + 1].joined(survivors)
            except Exception as error:
                self.failed.update(dict.fromkeys(batch.rows.tolist(), error))
        restarting: list[int] = queues[-1].rows.tolist()
        self.lost.update({row: len(self.said.pop(row)) for row in restarting})
        return restarting

    def answers(self) -> list[Routed]:
        """In input order; raises BatchError when one is missing."""
        if self.failed:
            answered = [None if row in self.failed else self.routed[row] for row in range(len(self.samples))]
            raise BatchError(self.failed, answered) from next(iter(self.failed.values()))
        return [self.routed[row] for row in range(len(self.samples))]

    def _next(self, queues: Sequence[_Waiting]) -> int | None:
        waiting = [segment for segment, queue in enumerate(queues) if len(queue.rows)]
        full = [segment for segment in waiting if len(queues[segment].rows) >= self.max_batch]
        return full[-1] if full else min(waiting, default=None)

    def _step(self, route: Route, segment: int, length: int, batch: _Waiting) -> _Waiting:
        """Run a batch through a segment; those that leave get their answer, the others are given back."""
        rows: list[int] = batch.rows.tolist()
        state, outputs = self._run(route, segment, length, batch)
        for row, output in zip(rows, outputs, strict=True):
            self.said.setdefault(row, []).append(output)
        heads = np.array([self.said[row] for row in rows])
        leave, margin = self._decide(route, segment, heads, batch.rows)
        path = Family.parse(route.family).at(segment + 1).name
        for place in np.flatnonzero(leave).tolist():
            row = rows[place]
            ran = len(self.said.pop(row)) + self.lost.get(row, 0)
            # a copy, so that an answer does not keep those of its batch in memory; so does indexing below
            own = heads[place].copy()
            self.routed[row] = Routed(outputs=own, path=path, segments_run=ran, margin=float(margin[place]))
        return _Waiting(batch.rows[~leave], {name: array[~leave] for name, array in state.items()})

    def _decide(self, route: Route, segment: int, heads: Array, rows: Rows) -> Verdict:
        if self.decider is None or segment + 1 not in route.asked:
            return Verdict(np.full(len(rows), segment + 1 == route.last), np.full(len(rows), np.nan))
        verdict = self.decider.after(route.family, segment, heads, self.features[rows])
        if verdict.leave.dtype != bool or not verdict.leave.shape == verdict.margin.shape == rows.shape:
            raise ShapeError(
                f"the rule gave leave {verdict.leave.dtype}{verdict.leave.shape} and margin {verdict.margin.shape}; "
                f"it must give bools and numbers of the shape {rows.shape}."
            )
        return verdict

    def _run(self, route: Route, segment: int, length: int, batch: _Waiting) -> tuple[Arrays, Array]:
        """State, empty behind the last segment of a route, and outputs."""
        samples = [self.samples[row] for row in batch.rows.tolist()]
        arrays = self.collate(samples, length) if segment == 0 else batch.state
        start = self.clock()
        state, outputs = self.steps[route.family].run(segment, arrays)
        seconds = self.clock() - start
        if segment + 1 == route.last:
            state = {}
        shapes = {"outputs": outputs.shape} | {name: array.shape for name, array in state.items()}
        wrong = {name: shape for name, shape in shapes.items() if shape[:1] != (len(samples),)}
        if wrong:
            raise ShapeError(f"{route.family} segment {segment} gave {wrong} for a batch of {len(samples)} samples.")
        if self.on_batch is not None:
            self.on_batch(BatchRun(route.family, segment, len(samples), length, seconds))
        return state, outputs
