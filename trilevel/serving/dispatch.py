"""From waiting rows to workers and back: batches through segments, each row in exactly one place.

A row waits in the batcher, or a worker has it, or its ticket has its answer. State between segments comes back with
every batch whose rows part, so that any worker can go on with any row.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, final

import numpy as np
import numpy.typing as npt

from trilevel.errors import InputError
from trilevel.serving.batching import Batcher, BatchingConfig
from trilevel.serving.entry import Batch
from trilevel.serving.observer import Observer
from trilevel.serving.plan import Key, Plan
from trilevel.serving.pool import Pool
from trilevel.serving.process import Done, Gone, Job
from trilevel.serving.requests import Arrays, DeadlineError, Step, UnavailableError, WorkerError
from trilevel.serving.rows import Row, Ticket

_LOG = logging.getLogger(__name__)
STOPPED = "the model was stopped before the answer came; ask again."


@final
class Dispatcher:
    """See the module. Everything runs in one event loop.

    Args:
        name: of the model.
        plan: what its rows go through.
        pool: its workers.
        batching: how rows wait.
        observer: told of batches.
    """

    def __init__(self, name: str, plan: Plan, pool: Pool, batching: BatchingConfig, observer: Observer) -> None:
        self.name, self.plan, self.pool, self.config = name, plan, pool, batching
        self._batcher: Batcher[Row] = Batcher(batching, plan.fit)
        self._observer = observer
        self._is_closed = self._is_kicked = False
        self._wake: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        pool.on_change = self._kick

    def admit(self, count: int, length: int, now: float, deadline: float | None) -> None:
        """Raise OverloadedError or UnavailableError if so many more rows of a length cannot be answered."""
        if self._is_closed:
            raise UnavailableError(STOPPED)
        if self.pool.given_up and not self.pool.live:
            raise UnavailableError(self._lost())
        self._batcher.admit(count, length, now, deadline, self.pool.live)

    def add(self, rows: Iterable[Row], now: float) -> None:
        """Let rows wait, and run what can run."""
        for row in rows:
            self._batcher.add(row, now)
        # rows of requests that came together run together: one turn of the loop reads them all
        if not self._is_kicked:
            self._is_kicked = True
            self._loop.call_soon(self._kick)

    def late(self, ticket: Ticket) -> None:
        """Give up a request whose deadline has passed."""
        if ticket.is_open:
            self._batcher.missed()
            ticket.failed(DeadlineError("the deadline passed before the answer came; ask with more time."))

    def leave(self, rows: Iterable[Row]) -> None:
        """Forget rows; those that wait are not computed."""
        for row in rows:
            self._batcher.leave(row)

    def waiting(self) -> dict[str, int]:
        """Rows that wait, by the path that ends behind their next segment."""
        found: dict[str, int] = {}
        for key, count in self._batcher.waiting().items():
            assert isinstance(key, Key)
            path = key.route.path(key.segment, self.plan.full_name)
            found[path] = found.get(path, 0) + count
        return found

    def close(self) -> None:
        """Take no more rows, and fail those that wait; those that run fail when their worker is stopped."""
        self._is_closed = True
        self.pool.on_change = lambda: None
        if self._wake is not None:
            self._wake.cancel()
        self._fail_waiting(STOPPED)

    def _lost(self) -> str:
        return f"model {self.name!r} has no worker: {self.pool.given_up}."

    def _kick(self) -> None:
        """Give every free worker what is due."""
        self._is_kicked = False
        if self.pool.given_up and not self.pool.live:
            self._fail_waiting(self._lost())
        while idle := self.pool.idle:
            batch, late = self._batcher.take(time.monotonic(), idle)
            for row in late:
                self.late(row.ticket)
            if batch is None:
                self._sleep()
                return
            self._submit(batch)

    def _sleep(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if (wake_at := self._batcher.wake_at()) is not None:
            self._wake = self._loop.call_later(max(0.0, wake_at - time.monotonic()), self._kick)

    def _submit(self, batch: Batch[Row]) -> None:
        key, rows = _key(batch), batch.entries
        try:
            job = Job(
                family=key.route.family,
                segment=key.segment,
                rows=len(rows),
                arrays=_stacked([row.arrays for row in rows]),
                leave=self.plan.margins(key.route, key.segment),
            )
            self.pool.submit(job, partial(self._finished, batch, time.monotonic()))
        # whatever it is, these rows are not lost
        except Exception as error:
            _LOG.exception("a batch of %s could not be sent", self.name)
            self._failed(rows, f"it could not be sent to a worker ({type(error).__name__})")

    def _finished(self, batch: Batch[Row], started: float, result: Done | Gone) -> None:
        rows = batch.entries
        if isinstance(result, Gone):
            if not self._is_closed:
                _LOG.warning("a worker of %s ended with %d rows: %s", self.name, len(rows), result.reason)
            self._try_again(rows, f"the worker ended: {result.reason}")
        elif not result.error:
            try:
                self._advance(batch, result, time.monotonic() - started)
            except Exception as error:
                _LOG.exception("the answers to a batch of %s could not be read", self.name)
                self._failed(rows, f"the worker's answer could not be read ({type(error).__name__})")
        elif len(rows) > 1:
            self._try_again(rows, result.error)
        elif result.is_input:
            self._batcher.leave(rows[0])
            rows[0].ticket.failed(InputError(result.error))
        else:
            self._failed(rows, result.error)

    def _try_again(self, rows: Sequence[Row], reason: str) -> None:
        """Once, each row alone, so that one that ends workers does so for itself."""
        now = time.monotonic()
        for row in rows:
            row.tries += 1
            if not row.ticket.is_open:
                self._batcher.leave(row)
            elif self._is_closed:
                self._batcher.leave(row)
                row.ticket.failed(UnavailableError(STOPPED))
            elif row.tries > 1:
                self._failed([row], reason)
            else:
                row.is_alone = True
                self._batcher.add(row, now)
        # the worker's place in the pool is looked after first
        self._loop.call_soon(self._kick)

    def _failed(self, rows: Sequence[Row], reason: str) -> None:
        for row in rows:
            self._batcher.leave(row)
            row.ticket.failed(WorkerError(f"the request failed in the worker: {reason}."))

    def _advance(self, batch: Batch[Row], result: Done, elapsed_s: float) -> None:
        """Take the answer to a batch: all rows passed each segment that ran but the last, behind which they part."""
        key, rows = _key(batch), batch.entries
        outputs: Arrays = {}
        verdict = None
        assert result.seconds, "a job runs one segment at least"
        # the way to the worker and back counts as waiting
        begun = time.monotonic() - sum(result.seconds)
        for number, (outputs, seconds) in enumerate(zip(result.outputs, result.seconds, strict=True)):
            step = key._replace(segment=key.segment + number)
            # what it takes from here, the way there and back included
            self._batcher.ran(Batch(step, rows), elapsed_s * seconds / max(1e-9, sum(result.seconds)))
            path = step.route.path(step.segment, self.plan.full_name)
            self._observer.batch(self.name, path, len(rows))
            verdict = None
            if step.route.asked:
                (head,) = outputs.values()
                verdict = self.plan.leaves(step.route, step.segment, head)
            for place, row in enumerate(rows):
                row.compute_s += seconds
                row.segment = step.segment
                if row.steps is not None:
                    row.steps.append(Step(path, begun, seconds, len(rows)))
                if verdict is not None:
                    row.margins.append(float(verdict[1][place]))
            begun += seconds
        now = time.monotonic()
        for place, row in enumerate(rows):
            row.is_alone = False
            is_last = row.segment + 1 == row.route.last
            if not row.ticket.is_open:
                self._batcher.leave(row)
            elif verdict[0][place] if verdict is not None else is_last:
                self._batcher.answered(row)
                path = row.route.path(row.segment, self.plan.full_name)
                row.ticket.answered(row, _one(outputs, place, len(rows)), path)
            else:
                if is_last:
                    row.begins(self.plan.full)
                else:
                    row.goes_on(_one(result.state, place, len(rows)))
                self._batcher.add(row, now)

    def _fail_waiting(self, message: str) -> None:
        for row in list(self._batcher.entries()):
            self._batcher.leave(row)
            row.ticket.failed(UnavailableError(message))


def _key(batch: Batch[Row]) -> Key:
    assert isinstance(batch.key, Key)
    return batch.key


def _stacked(parts: Sequence[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}


def _one(arrays: Arrays, place: int, count: int) -> dict[str, npt.NDArray[Any]]:
    """A row's arrays; copied, so that it does not keep those of its batch in memory."""
    if count == 1:
        return dict(arrays)
    return {name: array[place : place + 1].copy() for name, array in arrays.items()}
