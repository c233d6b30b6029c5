"""Rows on their way through a model, and the tickets that wait for them: a request's, and a shadow's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from trilevel.routing.executor import Route
from trilevel.serving.entry import Entry
from trilevel.serving.plan import Key, Piece
from trilevel.serving.requests import Arrays, Reply, Request, Step


class Ticket(Protocol):
    """What waits for rows."""

    @property
    def is_open(self) -> bool:
        """Whether it still waits."""
        ...

    def answered(self, row: Row, outputs: Arrays, path: str) -> None:
        """A row has its answer, outputs (1, ...)."""
        ...

    def failed(self, error: Exception) -> None:
        """A row will have none, and so will none of the others."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Row(Entry):
    """A row of a request.

    Attributes:
        ticket: that waits for it.
        place: among the rows of its request.
        piece: as it was sent, for when it begins anew.
        arrays: that its next segment reads, first axis 1.
        route: that it takes now; `segment` of it is next.
        begun: the route that it began with.
        margins: of the answers that it was asked for.
        compute_s: spent in batches, beside others.
        tries: that failed.
        is_shadowed: its answer is compared with the full path's.
        steps: that it passed, where its request is traced.
    """

    ticket: Ticket
    place: int
    piece: Piece
    arrays: Arrays
    route: Route
    begun: Route
    segment: int = 0
    margins: list[float] = field(default_factory=list)
    compute_s: float = 0.0
    tries: int = 0
    is_shadowed: bool = False
    steps: list[Step] | None = None

    def begins(self, route: Route) -> None:
        """Stand before the first segment of a route."""
        self.route, self.segment, self.arrays = route, 0, self.piece.arrays
        self.key = Key(route, 0, self.piece.shapes, self.piece.length)

    def goes_on(self, state: Arrays) -> None:
        """Stand before the next segment."""
        self.segment += 1
        self.arrays = state
        self.key = Key(self.route, self.segment, self.piece.shapes, self.piece.length)


def row_of(ticket: Ticket, place: int, piece: Piece, route: Route, arrived: float, request: Request) -> Row:
    """A row of a request before it waits."""
    return Row(
        key=Key(route, 0, piece.shapes, piece.length),
        arrived=arrived,
        deadline=request.deadline,
        priority=request.priority,
        length=piece.length,
        ticket=ticket,
        place=place,
        piece=piece,
        arrays=piece.arrays,
        route=route,
        begun=route,
        steps=[] if request.is_traced else None,
    )


@final
class RequestTicket:
    """A request that waits for all of its rows.

    Args:
        request: see there.
        arrived: when, of `time.monotonic`.
        count: its rows.
        future: of the rows' answers; the reply is made of it by whoever waits.
        on_row: told of each row that is answered, with the path.
    """

    def __init__(
        self,
        request: Request,
        arrived: float,
        count: int,
        future: asyncio.Future[None],
        on_row: Callable[[Row, Arrays, str], None] | None,
    ) -> None:
        self.request, self.arrived = request, arrived
        self._future, self._on_row = future, on_row
        self._left = count
        self.outputs: list[Arrays] = [{}] * count
        self.paths: list[str] = [""] * count
        self.compute_s = 0.0
        self.steps: tuple[Step, ...] = ()
        self.rows: list[Row] = []

    @property
    def is_open(self) -> bool:
        """Whether it still waits."""
        return not self._future.done()

    def answered(self, row: Row, outputs: Arrays, path: str) -> None:
        """Keep a row's answer; the last one ends the wait."""
        self.outputs[row.place], self.paths[row.place] = outputs, path
        self.compute_s = row.compute_s
        self.steps = tuple(row.steps or ())
        self._left -= 1
        if not self._left:
            self._future.set_result(None)
        if self._on_row is not None and row.is_shadowed:
            self._on_row(row, outputs, path)

    def failed(self, error: Exception) -> None:
        """End the wait with an error."""
        if not self._future.done():
            self._future.set_exception(error)

    def reply(self, model: str, version: str, now: float, explanations: tuple[dict[str, Any], ...]) -> Reply:
        """All answers in the order of the rows; the row that came last says how the time was spent."""
        total = now - self.arrived
        return Reply(
            model=model,
            version=version,
            outputs=_joined(self.outputs),
            paths=tuple(self.paths),
            seconds={"queue": max(0.0, total - self.compute_s), "compute": self.compute_s, "total": total},
            explanations=explanations,
            steps=self.steps,
        )


def _joined(outputs: list[Arrays]) -> dict[str, npt.NDArray[Any]]:
    if len(outputs) == 1:
        return dict(outputs[0])
    return {name: np.concatenate([one[name] for one in outputs]) for name in outputs[0]}


@final
class ShadowTicket:
    """A row that takes the full path too, after its request was answered, to compare.

    Args:
        outputs: that were answered.
        on_compared: told whether the full path answers otherwise; not called when it does not answer.
        on_end: called in any case.
    """

    def __init__(self, outputs: Arrays, on_compared: Callable[[bool], None], on_end: Callable[[], None]) -> None:
        self._outputs, self._on_compared, self._on_end = outputs, on_compared, on_end
        self.is_open = True

    def answered(self, row: Row, outputs: Arrays, path: str) -> None:
        """Compare the largest of each output."""
        self._end()
        differs = any(np.any(outputs[name].argmax(-1) != own.argmax(-1)) for name, own in self._outputs.items())
        self._on_compared(bool(differs))

    def failed(self, error: Exception) -> None:
        """Nothing is known, and nothing is counted."""
        self._end()

    def _end(self) -> None:
        if self.is_open:
            self.is_open = False
            self._on_end()
