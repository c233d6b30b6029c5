"""Queues by simulation: time is a number here."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilevel.errors import ConfigError
from trilevel.serving.batching import Batcher, BatchingConfig
from trilevel.serving.entry import Batch, Entry
from trilevel.serving.latency_fit import LatencyFit
from trilevel.serving.requests import OverloadedError


def entry(key: str = "a", arrived: float = 0.0, **options: Any) -> Entry:
    return Entry(key=key, arrived=arrived, **options)


def line(a: float, b: float) -> Callable[[Any], LatencyFit]:
    return lambda _key: LatencyFit([1, 100], [a + b, a + 100 * b])


def batcher(*, a: float = 0.0, b: float = 0.001, **options: Any) -> Batcher[Entry]:
    return Batcher(BatchingConfig(**options), line(a, b))


def filled(own: Batcher[Entry], entries: Sequence[Entry], now: float = 0.0) -> Batcher[Entry]:
    for one in entries:
        own.add(one, now)
    return own


def taken(own: Batcher[Entry], now: float = 0.0, idle: int = 1) -> list[Entry]:
    batch, _ = own.take(now, idle)
    return [] if batch is None else batch.entries


# order


def test_the_row_that_is_due_first_runs_first_whatever_came_first() -> None:
    rows = [entry(deadline=3.0), entry("b", deadline=2.0), entry("b", deadline=5.0), entry(deadline=1.0)]
    own = filled(batcher(max_batch=1), rows)
    assert [taken(own)[0] for _ in range(4)] == [rows[3], rows[1], rows[0], rows[2]]


def test_without_deadlines_the_order_is_that_of_arrival() -> None:
    rows = [entry(arrived=0.3), entry("b", arrived=0.1), entry(arrived=0.2)]
    own = filled(batcher(max_batch=1), rows, now=0.3)
    assert [taken(own, 0.3)[0].arrived for _ in range(3)] == [0.1, 0.2, 0.3]


def test_a_priority_moves_a_row_forward_by_a_bounded_time() -> None:
    early, late = entry(arrived=0.0), entry(arrived=11.0, priority=10**9)
    own = filled(batcher(max_batch=1, priority_s=1.0), [late, early])
    assert taken(own, 11.0) == [early]
    urgent = entry(arrived=12.0, priority=3)
    own.add(urgent, 12.0)
    own.add(entry(arrived=12.0, priority=2), 12.0)
    assert taken(own, 12.0) == [late]
    assert taken(own, 12.0) == [urgent]


def test_rows_of_one_key_share_a_batch_and_no_others() -> None:
    rows = [entry("a"), entry("b"), entry("a"), entry("b"), entry("a")]
    own = filled(batcher(), rows)
    assert taken(own) == [rows[0], rows[2], rows[4]]
    assert taken(own) == [rows[1], rows[3]]
    assert own.num_waiting == 0


# sizes


def test_a_batch_is_the_largest_that_keeps_the_first_due_time() -> None:
    rows = [entry(deadline=1.0 + place) for place in range(40)]
    own = filled(batcher(a=0.5, b=0.03, max_batch=32), rows)
    # 0.5 + 16 * 0.03 < 1 < 0.5 + 17 * 0.03
    assert len(taken(own)) == 16


def test_the_slo_is_a_due_time_too() -> None:
    own = filled(batcher(a=0.5, b=0.03, slo_s=0.81), [entry() for _ in range(40)])
    assert len(taken(own)) == 10


def test_rows_leave_time_for_the_segments_behind() -> None:
    own = batcher(b=0.1)
    # what rows cost, all segments together, is learned from those answered
    done = entry(spent=0.5)
    filled(own, [done])
    own.take(0.0, 1)
    own.answered(done)
    filled(own, [entry(deadline=1.05) for _ in range(20)])
    # 1.05 seconds, less 0.4 for what comes behind this segment
    assert len(taken(own)) == 6


def test_a_row_that_is_late_anyway_does_not_make_small_batches() -> None:
    own = filled(batcher(a=0.5, b=0.1), [entry(deadline=0.2), *(entry(deadline=9.0) for _ in range(20))])
    assert len(taken(own)) == 21


def test_free_workers_share_what_waits() -> None:
    own = filled(batcher(), [entry() for _ in range(9)])
    assert [len(taken(own, idle=idle)) for idle in (4, 3, 2, 1)] == [3, 2, 2, 2]


def test_what_was_never_measured_is_approached_by_doubling() -> None:
    own: Batcher[Entry] = filled(Batcher(BatchingConfig()), [entry() for _ in range(40)])
    sizes = []
    while (batch := own.take(0.0, 1)[0]) is not None:
        sizes.append(len(batch.entries))
        own.ran(batch, 0.01 * sizes[-1])
    assert sizes == [1, 2, 4, 8, 16, 9]


def test_a_row_that_is_tried_again_runs_alone() -> None:
    rows = [entry(), entry(is_alone=True), entry(), entry(is_alone=True)]
    own = filled(batcher(), rows)
    assert sorted(len(taken(own)) for _ in range(3)) == [1, 1, 2]


# waiting


def test_a_free_worker_does_not_wait_unless_told_to() -> None:
    own = filled(batcher(), [entry()])
    assert len(taken(own)) == 1
    assert own.wake_at() is None


def test_rows_that_come_often_wait_for_others_and_no_longer_than_allowed() -> None:
    own = batcher(max_wait_s=0.01)
    filled(own, [entry()], now=0.0)
    # nobody else is known to come
    assert len(taken(own, 0.0)) == 1
    own.add(entry(arrived=0.001), 0.001)
    assert taken(own, 0.001) == []
    assert own.wake_at() == pytest.approx(0.011)
    own.add(entry(arrived=0.002), 0.002)
    assert taken(own, 0.0109) == []
    assert len(taken(own, 0.0111)) == 2


def test_a_full_batch_and_a_near_deadline_do_not_wait() -> None:
    own = filled(batcher(max_wait_s=1.0, max_batch=4), [entry() for _ in range(4)])
    assert len(taken(own)) == 4
    own = filled(batcher(max_wait_s=1.0, b=0.2), [entry(deadline=0.5), entry(deadline=0.5)])
    # three rows take 0.6 s
    assert len(taken(own)) == 2


# leaving


def test_cancelled_rows_are_not_computed() -> None:
    rows = [entry() for _ in range(5)]
    own = filled(batcher(), rows)
    for one in rows[:2]:
        own.leave(one)
        own.leave(one)
    assert own.num_waiting == 3
    assert taken(own) == rows[2:]
    assert own.work == 0


def test_late_rows_are_given_back_and_not_computed() -> None:
    rows = [entry(deadline=1.0), entry(deadline=3.0), entry("b", deadline=1.5)]
    own = filled(batcher(), rows)
    batch, late = own.take(2.0, 1)
    assert batch is not None
    assert batch.entries == [rows[1]]
    assert set(late) == {rows[0], rows[2]}


def test_clients_that_come_and_go_do_not_fill_the_memory() -> None:
    own = batcher(max_queue=8)
    first = entry(deadline=0.5)
    own.add(first, 0.0)
    for _ in range(10_000):
        one = entry(deadline=9.0)
        own.add(one, 0.0)
        own.leave(one)
    assert sum(len(queue.heap) for queue in own._queues.values()) < 100


def test_lengths_that_clients_choose_do_not_fill_the_memory() -> None:
    own = batcher(max_wait_s=0.01)
    for number in range(3_000):
        own.add(entry(f"key {number}"), 0.0)
        own.take(1.0, 1)
    assert max(len(own._fits), len(own._gap), len(own._last_arrival)) <= 512
    assert len(own._queues) < 3


# admission


def test_a_full_queue_refuses() -> None:
    own = filled(batcher(max_queue=5), [entry() for _ in range(4)])
    own.admit(1, 1, 0.0, None, 1)
    with pytest.raises(OverloadedError, match="4 rows wait and 2 more were sent; 5 may wait") as caught:
        own.admit(2, 1, 0.0, None, 1)
    assert caught.value.retry_after_s > 0


def test_what_would_be_late_is_refused_at_once() -> None:
    own = batcher()
    done = entry(spent=0.1)
    own.add(done, 0.0)
    own.take(0.0, 1)
    own.answered(done)
    # the first of all is tried, whatever the estimate
    own.admit(1, 1, 0.0, 0.01, 1)
    filled(own, [entry() for _ in range(10)])
    with pytest.raises(OverloadedError, match=r"0.375 s after the deadline, because 10 rows") as caught:
        own.admit(1, 1, 0.0, 1.0, 1)
    assert caught.value.retry_after_s == pytest.approx(0.375)
    own.admit(1, 1, 0.0, 1.0, 2)
    own.admit(1, 1, 0.0, None, 1)


def test_whoever_is_late_makes_it_admit_less_for_a_while() -> None:
    own = batcher()
    done = entry(spent=0.1)
    filled(own, [done])
    own.take(0.0, 1)
    own.answered(done)
    filled(own, [entry() for _ in range(6)])
    own.admit(1, 1, 0.0, 1.0, 1)
    for _ in range(3):
        own.missed()
    with pytest.raises(OverloadedError):
        own.admit(1, 1, 0.0, 1.0, 1)
    for _ in range(400):
        one = entry(spent=0.1)
        own.add(one, 0.0)
        own.answered(one)
    own.admit(1, 1, 0.0, 1.0, 1)


# fits


@given(a=st.floats(0, 0.1), b=st.floats(1e-4, 0.01), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_line_is_found(a: float, b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fit = LatencyFit()
    for _ in range(200):
        rows = int(rng.integers(1, 33))
        fit.saw(rows, (a + b * rows) * rng.uniform(0.95, 1.05))
    for rows in (1, 7, 32):
        assert fit.seconds(rows) == pytest.approx(a + b * rows, rel=0.25, abs=0.01 * (a + b))
        assert fit.seconds(fit.most_rows(0.3)) <= 0.3 < fit.seconds(fit.most_rows(0.3) + 1)


def test_batches_of_one_size_do_not_turn_the_line() -> None:
    fit = LatencyFit([1, 32], [0.011, 0.042])
    for _ in range(100):
        fit.saw(8, 2 * (0.01 + 8 * 0.001))
    assert fit.a == pytest.approx(0.02, rel=0.01)
    assert fit.b == pytest.approx(0.002, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [([1], [0.5]), ([1, 8], [0.5, 0.4]), ([1, 8], [0.5, 8.0]), ([1, 8, 32], [0.003, 0.016, 0.07])],
)
def test_what_was_measured_before_never_gives_negative_costs(rows: list[int], seconds: list[float]) -> None:
    fit = LatencyFit(rows, seconds)
    assert fit.a >= 0
    assert fit.b >= 0
    assert 0 < fit.seconds(1) < fit.seconds(64) or fit.b == 0


# all together


@dataclass
class Simulated:
    """Workers whose batches take `cost(key, rows)` seconds; rows of a key go on to the key behind it in `chain`."""

    own: Batcher[Entry]
    cost: Callable[[str, int], float]
    workers: int = 1
    chain: dict[str, Callable[[Entry], str | None]] = field(default_factory=dict)
    answered: dict[int, float] = field(default_factory=dict)
    refused: list[Entry] = field(default_factory=list)
    late: list[Entry] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def run(self, arrivals: Sequence[Entry]) -> None:
        order = itertools.count()
        events: list[tuple[float, int, Any]] = [(one.arrived, next(order), one) for one in arrivals]
        heapq.heapify(events)
        idle = self.workers
        while events:
            now, _, what = heapq.heappop(events)
            if isinstance(what, Entry):
                try:
                    self.own.admit(1, what.length, now, what.deadline, self.workers)
                    self.own.add(what, now)
                except OverloadedError:
                    self.refused.append(what)
            else:
                idle += 1
                self._ran(what[0], what[1], now)
            while idle:
                batch, late = self.own.take(now, idle)
                self.late += late
                if batch is None:
                    break
                idle -= 1
                self.sizes.append(len(batch.entries))
                seconds = self.cost(str(batch.key), len(batch.entries))
                heapq.heappush(events, (now + seconds, next(order), (batch, seconds)))

    def _ran(self, batch: Batch[Entry], seconds: float, now: float) -> None:
        self.own.ran(batch, seconds)
        for one in batch.entries:
            behind = self.chain[str(batch.key)](one) if str(batch.key) in self.chain else None
            if behind is None:
                assert id(one) not in self.answered
                self.own.answered(one)
                self.answered[id(one)] = now
            else:
                one.key = behind
                self.own.add(one, now)


def poisson(rate: float, seconds: float, seed: int, make: Callable[[float, np.random.Generator], Entry]) -> list[Entry]:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, int(rate * seconds)))
    return [make(float(now), rng) for now in times]


def test_a_rare_key_waits_no_longer_than_a_common_one() -> None:
    cost = 0.01
    common = poisson(90, 60, 1, lambda now, _rng: entry("common", now))
    rare = poisson(1, 60, 2, lambda now, _rng: entry("rare", now))
    simulated = Simulated(Batcher(BatchingConfig(max_batch=8)), lambda _key, rows: cost * rows)
    simulated.run([*common, *rare])
    waits = {
        name: np.array([simulated.answered[id(one)] - one.arrived for one in rows])
        for name, rows in (("common", common), ("rare", rare))
    }
    assert len(simulated.answered) == len(common) + len(rare)
    assert np.quantile(waits["rare"], 0.95) < 1.5 * np.quantile(waits["common"], 0.95)


def test_a_rare_key_under_a_flood_of_urgent_ones_waits_a_bounded_time() -> None:
    flood = [entry("flood", 0.005 * place, priority=5) for place in range(4_000)]
    rare = entry("rare", 1.0)
    simulated = Simulated(Batcher(BatchingConfig(max_batch=1, max_queue=10_000)), lambda _key, _rows: 0.006)
    simulated.run([*flood, rare])
    # five steps of a second, and a second of backlog for every five of arrivals
    assert simulated.answered[id(rare)] < 9
    assert len(simulated.answered) == 4_001


@pytest.mark.parametrize("load", [2.0, 10.0])
def test_overload_is_refused_and_what_is_accepted_is_in_time(load: float) -> None:
    """Capacity is 1 / 1.1 ms at a batch of 32 or so."""
    capacity = 32 / (0.005 + 32 * 0.001)
    rows = poisson(load * capacity, 10, 3, lambda now, _rng: entry("a", now, deadline=now + 0.2))
    simulated = Simulated(Batcher(BatchingConfig()), lambda _key, rows: 0.005 + 0.001 * rows)
    simulated.run(rows)
    by_id = {id(one): one for one in rows}
    in_time = sum(now <= (by_id[one].deadline or 0) for one, now in simulated.answered.items())
    assert in_time > 0.9 * capacity * 10
    accepted = len(rows) - len(simulated.refused)
    assert in_time > 0.99 * accepted
    # nothing is lost: each is answered, refused or late
    assert len(simulated.answered) + len(simulated.refused) + len(simulated.late) == len(rows)


def test_survivors_go_on_with_those_that_wait_deeper() -> None:
    def half(one: Entry) -> str | None:
        return "deep" if one.priority == 0 and one.length == 2 else None

    def make(now: float, rng: np.random.Generator) -> Entry:
        return entry("shallow", now, deadline=now + 0.5, length=int(rng.integers(1, 3)))

    rows = poisson(400, 10, 4, make)
    own: Batcher[Entry] = Batcher(BatchingConfig())
    simulated = Simulated(own, lambda _key, rows: 0.002 + 0.001 * rows, chain={"shallow": half})
    simulated.run(rows)
    assert len(simulated.answered) == len(rows) - len(simulated.refused)
    assert len(simulated.answered) > 0.99 * len(rows)
    assert own.num_waiting == own.work == 0


def test_low_load_runs_rows_alone_and_at_once() -> None:
    rows = [entry("a", place * 1.0) for place in range(50)]
    simulated = Simulated(Batcher(BatchingConfig()), lambda _key, rows: 0.01 * rows)
    simulated.run(rows)
    assert all(simulated.answered[id(one)] - one.arrived == pytest.approx(0.01) for one in rows)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_happens_each_row_is_in_one_place(data: st.DataObject) -> None:
    own = batcher(max_batch=4, max_queue=10**6)
    waiting: set[int] = set()
    running: list[Batch[Entry]] = []
    # the length is a name here
    rows: list[Entry] = []
    now = 0.0
    for _ in range(data.draw(st.integers(0, 40))):
        now += data.draw(st.floats(0, 0.3))
        step = data.draw(st.sampled_from(["add", "take", "run", "cancel"]))
        if step == "add":
            left = data.draw(st.none() | st.floats(0, 1))
            deadline = None if left is None else now + left
            one = entry(data.draw(st.sampled_from("ab")), now, deadline=deadline, is_alone=data.draw(st.booleans()))
            own.add(one, now)
            one.length = len(rows)
            rows.append(one)
            waiting.add(one.length)
        elif step == "take":
            batch, late = own.take(now, data.draw(st.integers(0, 3)))
            for one in late:
                waiting.remove(one.length)
            if batch is not None:
                assert len({one.key for one in batch.entries}) == 1
                assert len(batch.entries) <= 4
                for one in batch.entries:
                    waiting.remove(one.length)
                running.append(batch)
        elif step == "run" and running:
            batch = running.pop()
            own.ran(batch, 0.1)
            for one in batch.entries:
                if data.draw(st.booleans()):
                    own.add(one, now)
                    waiting.add(one.length)
                else:
                    own.answered(one)
        elif step == "cancel" and waiting:
            name = data.draw(st.sampled_from(sorted(waiting)))
            own.leave(rows[name])
            waiting.remove(name)
        assert own.num_waiting == len(waiting) == sum(own.waiting().values())
        assert own.work >= 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 129}, "max_batch=129 must lie in 1 to 128"),
        ({"max_queue": 0}, "max_queue=0"),
        ({"patience_s": 0.0}, "patience_s=0.0"),
        ({"slo_s": 0.0}, "slo_s=0.0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BatchingConfig(**options)
