"""Which rows run next, and how many of them together: queues by what can run in one batch. No clock, no processes.

Rows wait in a queue of their key, such as (family, segment, length). A free worker takes from the queue whose first row
is due first. The due time of a row is set once, so whatever arrives later stands behind it and a rare key waits no
longer than a common one; a priority moves it by a bounded time, for the same reason. The batch is the largest that is
predicted to keep the due time, and no more than the share of one of the free workers.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic

from trilevel.errors import ConfigError
from trilevel.serving.entry import Batch, E
from trilevel.serving.latency_fit import LatencyFit
from trilevel.serving.requests import OverloadedError

MAX_PRIORITY = 10
MAX_BATCH = 128
_MAX_FITS = 512
# of the mean cost of a row, and of the time between two rows
_FOLLOW = 0.05
# of the time that is expected: batches that are made smaller to be in time take longer, row for row
_MARGIN = 1.25
_MAX_MARGIN = 5.0
# what a request that is late makes of it, and an answer
_ALARM, _CALM = 1.1, 0.999
_LEAST_RETRY_S = 0.05
_LEAST_HEAP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingConfig:
    """How rows wait.

    Attributes:
        max_batch: rows that run together.
        max_queue: rows that wait, of one version of a model.
        max_wait_s: that a free worker is left idle for more rows; 0 for none, best where a batch costs as much as its
            rows alone (a CPU).
        slo_s: within which every row should be answered; None sets the deadlines of requests alone.
        patience_s: in place of a due time, for rows that have none.
        priority_s: that a step of priority moves a due time forward.

    Raises:
        ConfigError: a value is out of range.
    """

    max_batch: int = 32
    max_queue: int = 1024
    max_wait_s: float = 0.0
    slo_s: float | None = None
    patience_s: float = 1.0
    priority_s: float = 1.0

    def __post_init__(self) -> None:
        """Check every value."""
        if not 1 <= self.max_batch <= MAX_BATCH:
            raise ConfigError(f"max_batch={self.max_batch} must lie in 1 to {MAX_BATCH}.")
        if self.max_queue < 1:
            raise ConfigError(f"max_queue={self.max_queue} must be >= 1.")
        if self.max_wait_s < 0 or self.patience_s <= 0 or self.priority_s < 0:
            raise ConfigError(
                f"max_wait_s={self.max_wait_s} and priority_s={self.priority_s} must be >= 0, and "
                f"patience_s={self.patience_s} > 0."
            )
        if self.slo_s is not None and self.slo_s <= 0:
            raise ConfigError(f"slo_s={self.slo_s} must be > 0; None sets no time.")


@dataclass(slots=True)
class _Queue(Generic[E]):
    """Rows of a key by their due time. Those cancelled stay in the heap until they come up."""

    is_alone: bool
    heap: list[tuple[float, int, E]] = field(default_factory=list)
    num_waiting: int = 0


class Batcher(Generic[E]):
    """See the module.

    Args:
        config: see there.
        prior: what is known of a key before its first batch.

    Attributes:
        num_waiting: rows that wait.
        work: seconds of a worker that all rows here are expected to take, those that run included.
    """

    def __init__(self, config: BatchingConfig, prior: Callable[[Hashable], LatencyFit] | None = None) -> None:
        self.config = config
        self.num_waiting = 0
        self.work = 0.0
        self._prior = prior or (lambda _key: LatencyFit())
        self._queues: dict[tuple[Hashable, bool], _Queue[E]] = {}
        self._fits: OrderedDict[Hashable, LatencyFit] = OrderedDict()
        self._num_inside = 0
        self._count = 0
        # seconds of a worker for each unit of a row's length, all its segments together
        self._cost: float | None = None
        self._margin = _MARGIN
        self._last_arrival: dict[Hashable, float] = {}
        self._gap: dict[Hashable, float] = {}

    def waiting(self) -> dict[Hashable, int]:
        """Rows that wait, by key."""
        found: dict[Hashable, int] = {}
        for (key, _), queue in self._queues.items():
            found[key] = found.get(key, 0) + queue.num_waiting
        return found

    def fit(self, key: Hashable) -> LatencyFit:
        """What batches of a key take."""
        if key not in self._fits:
            # lengths are the clients' choice, and must not fill the memory
            if len(self._fits) >= _MAX_FITS:
                self._fits.popitem(last=False)
            self._fits[key] = self._prior(key)
        self._fits.move_to_end(key)
        return self._fits[key]

    def admit(self, count: int, length: int, now: float, deadline: float | None, workers: int) -> None:
        """Raise `OverloadedError` if so many more rows cannot wait here, or would be answered after their deadline."""
        wait = self.work / max(1, workers)
        if self.num_waiting + count > self.config.max_queue:
            raise OverloadedError(
                f"{self.num_waiting} rows wait and {count} more were sent; {self.config.max_queue} may wait. Ask again "
                "later, or send fewer rows in a request.",
                retry_after_s=max(_LEAST_RETRY_S, wait * count / max(1, self.num_waiting)),
            )
        # with nothing before them they are tried, whatever the estimate: else it would never be put right
        if deadline is None or not self._num_inside:
            return
        own = self._expected(length) * count / max(1, min(workers, count))
        late = now + self._margin * (wait + own) - deadline
        if late > 0:
            raise OverloadedError(
                f"the answer is expected {late:.3f} s after the deadline, because {self._num_inside} rows are before "
                "it. Ask again later, or with more time.",
                retry_after_s=max(_LEAST_RETRY_S, late),
            )

    def add(self, entry: E, now: float) -> None:
        """Let a row wait: a new one, one that goes on to its next segment, or one that is tried again."""
        if not entry.is_counted:
            entry.is_counted, entry.work = True, self._expected(entry.length)
            self._num_inside += 1
            self.work += entry.work
            self._arrived(entry.key, now)
        queue = self._queues.setdefault((entry.key, entry.is_alone), _Queue(entry.is_alone))
        entry.queued, entry.is_waiting = now, True
        self._count += 1
        heapq.heappush(queue.heap, (self._rank(entry), self._count, entry))
        queue.num_waiting += 1
        self.num_waiting += 1

    def leave(self, entry: E) -> None:
        """Let a row go: answered, failed or cancelled; one that waits is not computed. Twice is as good as once."""
        if entry.is_waiting:
            self._taken(entry)
            queue = self._queues[entry.key, entry.is_alone]
            # clients that come and go must not fill the memory
            if len(queue.heap) > 2 * queue.num_waiting + _LEAST_HEAP:
                queue.heap = [one for one in queue.heap if one[2].is_waiting]
                heapq.heapify(queue.heap)
        if entry.is_counted:
            entry.is_counted = False
            self._num_inside -= 1
            self.work = max(0.0, self.work - entry.work) if self._num_inside else 0.0

    def answered(self, entry: E) -> None:
        """Let a row go that has its answer, and learn from it what rows cost."""
        cost = entry.spent / max(1, entry.length)
        self._cost = cost if self._cost is None else self._cost + _FOLLOW * (cost - self._cost)
        self._margin = max(_MARGIN, self._margin * _CALM)
        self.leave(entry)

    def missed(self) -> None:
        """Admit less for a while: a request that was admitted was late."""
        self._margin = min(_MAX_MARGIN, self._margin * _ALARM)

    def ran(self, batch: Batch[E], seconds: float) -> None:
        """Count a batch that ran."""
        count = len(batch.entries)
        self.fit(batch.key).saw(count, seconds)
        for entry in batch.entries:
            entry.spent += seconds / count
            if entry.is_counted:
                done = min(entry.work, seconds / count)
                entry.work -= done
                self.work = max(0.0, self.work - done)

    def take(self, now: float, idle: int) -> tuple[Batch[E] | None, list[E]]:
        """The batch to run next on one of the idle workers, if any, and the rows whose deadline has passed."""
        late: list[E] = []
        first = None
        for name, queue in list(self._queues.items()):
            late.extend(self._clean(queue, now))
            if not queue.heap:
                del self._queues[name]
            elif now >= self._held_until(name[0], queue) and (first is None or queue.heap[0] < first[1].heap[0]):
                first = name[0], queue
        if first is None or idle < 1:
            return None, late
        key, queue = first
        entries: list[E] = []
        for _ in range(self._size(key, queue, now, idle)):
            late.extend(self._clean(queue, now))
            if not queue.heap:
                break
            entry = queue.heap[0][2]
            self._taken(entry)
            heapq.heappop(queue.heap)
            entries.append(entry)
        return (Batch(key, entries) if entries else None), late

    def wake_at(self) -> float | None:
        """When a row that is held back for others must go; None if none is."""
        if not self.config.max_wait_s:
            return None
        times = (self._held_until(key, queue) for (key, _), queue in self._queues.items() if queue.num_waiting)
        return min(times, default=None)

    def entries(self) -> Iterator[E]:
        """All rows that wait."""
        for queue in self._queues.values():
            yield from (entry for _, _, entry in queue.heap if entry.is_waiting)

    def _rank(self, entry: E) -> float:
        """The due time by which rows are served."""
        due = self._due(entry)
        due = entry.arrived + self.config.patience_s if due == math.inf else due
        return due - self.config.priority_s * max(-MAX_PRIORITY, min(MAX_PRIORITY, entry.priority))

    def _due(self, entry: E) -> float:
        own = math.inf if entry.deadline is None else entry.deadline
        return own if self.config.slo_s is None else min(own, entry.arrived + self.config.slo_s)

    def _size(self, key: Hashable, queue: _Queue[E], now: float, idle: int) -> int:
        """Rows of the next batch of a queue."""
        if queue.is_alone:
            return 1
        limit = min(self.config.max_batch, -(-queue.num_waiting // idle))
        fit, entry = self.fit(key), queue.heap[0][2]
        if not fit.is_known:
            return 1
        # what is not known is approached by doubling
        limit = min(limit, 2 * fit.largest)
        # segments behind this one take time too
        left = self._due(entry) - now - max(0.0, entry.work - fit.seconds(1))
        keeps = limit if left == math.inf else fit.most_rows(left)
        # a row that is late whatever is done holds nobody up
        return limit if keeps < 1 else min(limit, keeps)

    def _held_until(self, key: Hashable, queue: _Queue[E]) -> float:
        """Until when a queue waits for more rows; in the past where waiting cannot help."""
        entry, config = queue.heap[0][2], self.config
        is_sparse = self._gap.get(key, math.inf) > config.max_wait_s
        if not config.max_wait_s or queue.is_alone or queue.num_waiting >= config.max_batch or is_sparse:
            return -math.inf
        last = self._due(entry) - self.fit(key).seconds(queue.num_waiting + 1) - max(0.0, entry.work)
        return min(entry.queued + config.max_wait_s, last)

    def _clean(self, queue: _Queue[E], now: float) -> list[E]:
        """Take rows from the front that were cancelled, and those that are late, which are given back."""
        late = []
        while queue.heap:
            entry = queue.heap[0][2]
            if entry.is_waiting and not (entry.deadline is not None and entry.deadline <= now):
                break
            heapq.heappop(queue.heap)
            if entry.is_waiting:
                self.leave(entry)
                late.append(entry)
        return late

    def _taken(self, entry: E) -> None:
        entry.is_waiting = False
        self._queues[entry.key, entry.is_alone].num_waiting -= 1
        self.num_waiting -= 1

    def _expected(self, length: int) -> float:
        return (self._cost or 0.0) * max(1, length)

    def _arrived(self, key: Hashable, now: float) -> None:
        if not self.config.max_wait_s:
            return
        last = self._last_arrival.get(key)
        if len(self._last_arrival) >= _MAX_FITS:
            self._last_arrival.clear()
            self._gap.clear()
        self._last_arrival[key] = now
        if last is not None:
            gap = self._gap.get(key, now - last)
            self._gap[key] = gap + 0.2 * (now - last - gap)
