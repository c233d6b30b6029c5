"""Too much load for a minute, and some load for long: what is answered in time, and what memory does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, final

from trilevel.bench.harness import Bar, Progress
from trilevel.bench.serving.goodput import Contender
from trilevel.bench.serving.load import Load, run_load
from trilevel.bench.serving.process import ServerProcess

OVERLOAD = 3.0
SOAK_SHARE = 0.7
_EVERY_S = 1.0
# memory of a server that has answered for so long is what it is compared with
_SETTLED = 0.2
_WINDOW = 0.2


@final
@dataclass(slots=True)
class Memory:
    """What a server held, second by second."""

    bytes: list[int] = field(default_factory=list)

    @contextmanager
    def watch(self, server: ServerProcess) -> Iterator[None]:
        """Look at it in a thread, as long as the block runs."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(_EVERY_S):
                self.bytes.append(server.memory_bytes)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @property
    def ratio(self) -> float | None:
        """What the end held over what was held once it had settled; None where too little was seen.

        >>> Memory([100] * 5 + [200] * 15 + [204] * 5).ratio
        1.02
        """
        count = len(self.bytes)
        width, start = int(_WINDOW * count), int(_SETTLED * count)
        if not width:
            return None
        first, last = median(self.bytes[start : start + width]), median(self.bytes[-width:])
        return last / first


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """A load and what it did; `peak` is the goodput at the best rate before."""

    workload: str
    name: str
    load: Load
    memory: Memory
    slo_s: float
    peak: float

    @property
    def share(self) -> float:
        """Of the peak, in time."""
        return self.load.goodput(self.slo_s) / self.peak if self.peak else 0.0

    @property
    def p99_of_deadline(self) -> float | None:
        """99th percentile of the answers, from when they were to be sent, over the deadline; None without answers."""
        found = self.load.percentile_ms(99)
        return None if found is None else found / 1e3 / self.slo_s

    def row(self) -> dict[str, Any]:
        """Of the table."""
        return {
            "workload": self.workload,
            "load": self.name,
            "seconds": self.load.seconds,
            "requests": len(self.load),
            "goodput": self.load.goodput(self.slo_s),
            "of_peak": self.share,
            "p99_of_deadline": self.p99_of_deadline,
            "memory_ratio": self.memory.ratio,
            "memory_bytes": max(self.memory.bytes, default=None),
            "lost": self.load.num_lost,
            **{f"status {status}": count for status, count in self.load.counts().items()},
        }


def press(one: Contender, name: str, rate: float, seconds: float, progress: Progress) -> Pressure:
    """Send at a rate and watch memory."""
    progress(f"{one.workload.name}: {name}, {rate:.3g}/s", 0.0)
    memory = Memory()
    spec = one.spec(rate=rate, seconds=seconds, deadline_s=one.slo_s, connections=16)
    with one.server.running(), memory.watch(one.server):
        load = run_load(spec, one.workload.bodies)
    return Pressure(workload=one.workload.name, name=name, load=load, memory=memory, slo_s=one.slo_s, peak=one.goodput)


def pressure_bars(overloads: Sequence[Pressure], soaks: Sequence[Pressure], *, has_soak: bool) -> list[Bar]:
    """What issue 7 promises; the worst of them counts."""

    def most(found: Sequence[Pressure], value: Callable[[Pressure], float | None]) -> float | None:
        known = [number for number in map(value, found) if number is not None]
        return max(known) if known and len(known) == len(found) else None

    share = most(overloads, lambda own: -own.share)
    bars = [
        Bar(name="overload_goodput_share", value=None if share is None else -share, op=">=", bar=0.9),
        Bar(name="overload_p99_of_deadline", value=most(overloads, lambda own: own.p99_of_deadline), op="<=", bar=1.0),
        Bar(name="overload_memory_ratio", value=most(overloads, lambda own: own.memory.ratio), op="<=", bar=1.05),
    ]
    if has_soak:
        bars.append(Bar(name="soak_memory_ratio", value=most(soaks, lambda own: own.memory.ratio), op="<=", bar=1.02))
    return bars
