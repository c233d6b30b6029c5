"""What waits and runs: rows, as queues see them, and batches of them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A row on its way. Times are of one clock, in seconds.

    Attributes:
        key: rows of one key may run in one batch.
        arrived: when its request did.
        deadline: of its request; the row is dropped when it has passed.
        priority: see `Request`; beyond 10 it changes nothing.
        length: of the row, of which its cost is some multiple.
        is_alone: it runs in a batch of its own, because it was in one that failed.
        queued: when it came into this queue.
        work: seconds of a worker that it is expected to take, all told.
    """

    key: Hashable
    arrived: float
    deadline: float | None = None
    priority: int = 0
    length: int = 1
    is_alone: bool = False
    queued: float = 0.0
    work: float = 0.0
    spent: float = 0.0
    is_waiting: bool = False
    is_counted: bool = False


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True)
class Batch(Generic[E]):
    """Rows of one key that run together."""

    key: Hashable
    entries: list[E]
