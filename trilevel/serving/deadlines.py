"""Time limits that cost next to nothing while they are kept: one timer for all of them.

uvloop takes 20 to 40 microseconds to set a timer and drop it again, which `asyncio.timeout` does for every request.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from types import TracebackType
from typing import Self, final

_FEW = 1024


@final
class Limit:
    """Cancels the task that entered it once its time is over, and raises TimeoutError where that ends it."""

    __slots__ = ("_deadlines", "_ends", "_task", "is_over")

    def __init__(self, deadlines: Deadlines, ends: float | None) -> None:
        self._deadlines = deadlines
        self._ends = ends
        self._task: asyncio.Task[object] | None = None
        self.is_over = False

    def __enter__(self) -> Self:
        if self._ends is not None:
            self._task = asyncio.current_task()
            self._deadlines.add(self._ends, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        self._deadlines.drop()
        # others may have cancelled the task too: then it stays cancelled
        if self.is_over and task.uncancel() <= 0 and kind is asyncio.CancelledError:
            raise TimeoutError from error

    @property
    def is_kept(self) -> bool:
        """Whether a task is still within it."""
        return self._task is not None

    def end(self) -> None:
        """The time is over."""
        if self._task is not None:
            self.is_over = True
            self._task.cancel()


@final
class Deadlines:
    """Limits of one event loop, the earliest first.

    Those that were kept stay in the queue until their time, or until they are more than half of it.
    """

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, Limit]] = []
        self._count = itertools.count()
        self._num_dropped = 0
        self._timer: asyncio.TimerHandle | None = None
        self._wakes = float("inf")

    def __len__(self) -> int:
        return len(self._queue)

    def within(self, seconds: float | None) -> Limit:
        """A limit for what is done in `with`; None for none."""
        return Limit(self, None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def add(self, ends: float, limit: Limit) -> None:
        """Keep an eye on a limit."""
        heapq.heappush(self._queue, (ends, next(self._count), limit))
        if ends < self._wakes:
            self._wake(ends)

    def drop(self) -> None:
        """One of the limits was left."""
        self._num_dropped += 1
        if self._num_dropped > max(_FEW, len(self._queue) // 2):
            self._queue = [entry for entry in self._queue if entry[2].is_kept]
            heapq.heapify(self._queue)
            self._num_dropped = 0

    def _wake(self, ends: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes = ends
        self._timer = asyncio.get_running_loop().call_at(ends, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        self._timer, self._wakes = None, float("inf")
        while self._queue and (self._queue[0][0] <= now or not self._queue[0][2].is_kept):
            heapq.heappop(self._queue)[2].end()
        if self._queue:
            self._wake(self._queue[0][0])
