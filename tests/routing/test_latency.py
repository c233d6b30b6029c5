from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilevel.errors import ConfigError, InputError
from trilevel.routing.latency import Floats, LatencyTable, measure
from trilevel.routing.steps import MAX_PLACES, Array, Arrays

BATCHES, LENGTHS = (1, 3, 7), (5, 11)
MACHINE = {"cpu": "a fake", "cores": 2}


class Clock:
    """Seconds that pass when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.worked: list[str] = []
        self.slowness = 1.0

    def __call__(self) -> float:
        return self.now

    def work(self, what: str, ms: float) -> None:
        self.worked.append(what)
        self.now += 1e-3 * ms * self.slowness


class TimedSteps:
    """Segment i takes `ms[i] * batch + length` fake milliseconds."""

    def __init__(self, name: str, ms: tuple[float, ...], clock: Clock) -> None:
        self.name, self.ms, self.clock = name, ms, clock

    @property
    def num_segments(self) -> int:
        return len(self.ms)

    def run(self, segment: int, arrays: Arrays) -> tuple[Arrays, Array]:
        batch, length = arrays["x"].shape
        self.clock.work(f"{self.name}.{segment}", self.ms[segment] * batch + length)
        return arrays, arrays["x"].sum(1)


def inputs(batch: int, length: int) -> Arrays:
    return {"x": np.ones((batch, length))}


def expected(ms: tuple[float, ...]) -> Floats:
    """Milliseconds through each segment, (segments, batches, lengths)."""
    return np.cumsum([[[own * batch + length for length in LENGTHS] for batch in BATCHES] for own in ms], axis=0)


def table(through_ms: dict[str, Any] | None = None, **values: Any) -> LatencyTable:
    given: dict[str, Any] = {
        "machine": MACHINE,
        "batches": BATCHES,
        "lengths": LENGTHS,
        "router_ms": np.full((3, 2), 0.5),
        "through_ms": {"int8": expected((2.0, 3.0)), "float32": expected((13.0,))}
        if through_ms is None
        else through_ms,
    }
    return LatencyTable(**{**given, **values})


@pytest.mark.parametrize("is_whole", [False, True])
def test_measured_times_are_those_that_passed(is_whole: bool) -> None:
    clock = Clock()
    steps = {"int8": TimedSteps("int8", (2.0, 3.0), clock), "float32": TimedSteps("float32", (13.0,), clock)}
    found = measure(
        steps, inputs, batches=BATCHES, lengths=LENGTHS, machine=MACHINE, is_whole=is_whole, clock=clock,
        router=lambda arrays: clock.work("router", 0.25 * len(arrays["x"])),
    )  # fmt: skip
    assert (found.batches, found.lengths, found.machine) == (BATCHES, LENGTHS, MACHINE)
    router = 0.25 * np.array(BATCHES)[:, None] * np.ones((1, 2))
    np.testing.assert_allclose(found.router_ms, router)
    np.testing.assert_allclose(found.through_ms["int8"], expected((2.0, 3.0)))
    np.testing.assert_allclose(found.through_ms["float32"], expected((13.0,)))
    np.testing.assert_allclose(found.path_ms("int8/2"), expected((2.0, 3.0))[1] + router)
    np.testing.assert_allclose(found.segment_ms("int8")[1], expected((3.0,))[0])


def test_other_models_take_their_turn_and_are_no_paths() -> None:
    clock = Clock()
    others = {
        "small": lambda arrays: clock.work("small", 2.0 * len(arrays["x"])),
        "a/b": lambda _: clock.work("a/b", 7.0),
    }
    found = measure(
        {"int8": TimedSteps("int8", (2.0, 3.0), clock)}, inputs, batches=BATCHES, lengths=LENGTHS, machine=MACHINE,
        others=others, clock=clock, router=lambda _: clock.work("router", 1.0),
    )  # fmt: skip
    assert clock.worked[:5] == ["router", "int8.0", "int8.1", "small", "a/b"]
    np.testing.assert_allclose(found.through_ms["int8"], expected((2.0, 3.0)))
    assert set(found.through_ms) == {"int8"}
    # without the router
    np.testing.assert_allclose(found.path_ms("small"), 2.0 * np.array(BATCHES)[:, None] * np.ones((1, 2)))
    assert found.ms("a/b", 2, 7) == pytest.approx(7.0)
    again = LatencyTable.from_dict(json.loads(json.dumps(found.to_dict())))
    np.testing.assert_array_equal(again.path_ms("small"), found.path_ms("small"))
    # tables that were written before there were others
    old = {name: value for name, value in found.to_dict().items() if name != "others_ms"}
    assert not LatencyTable.from_dict(old).others_ms
    with pytest.raises(InputError, match="others_ms must be objects"):
        LatencyTable.from_dict(found.to_dict() | {"others_ms": []})
    with pytest.raises(ConfigError, match="others_ms of small must be finite times > 0"):
        replace(found, others_ms={"small": np.zeros((3, 2))})


def test_a_batch_that_runs_in_pieces_is_measured_by_one_of_them() -> None:
    clock, length = Clock(), MAX_PLACES // 3
    steps = {"int8": TimedSteps("int8", (2.0,), clock)}
    found = measure(
        steps, inputs, batches=[1, 2, 9], lengths=[5, length], machine={}, clock=clock, min_rounds=1, max_rounds=1,
        warm_up=0, router=lambda arrays: clock.work(f"router of {len(arrays['x'])}", len(arrays["x"])),
    )  # fmt: skip
    assert [what for what in clock.worked if "router" in what] == [f"router of {rows}" for rows in (1, 1, 2, 2, 9, 3)]
    own, long = found.through_ms["int8"][0].T
    np.testing.assert_allclose(own, [7, 9, 23])
    np.testing.assert_allclose(long, [2 + length, 4 + length, 3 * (6 + length)])
    np.testing.assert_allclose(found.router_ms, [[1, 1], [2, 2], [9, 9]])


def test_families_take_turns_at_each_point() -> None:
    clock = Clock()
    steps = {name: TimedSteps(name, (1.0, 1.0), clock) for name in ("int8", "float32")}
    measure(
        steps, inputs, batches=[2], lengths=[3, 5], machine={}, clock=clock, warm_up=2, min_rounds=3, max_rounds=3,
        router=lambda _: clock.work("router", 1.0),
    )  # fmt: skip
    turn = ["router", "int8.0", "int8.1", "float32.0", "float32.1"]
    assert clock.worked == turn * 2 * (2 + 3)
    clock.worked.clear()
    measure(steps, inputs, batches=[2], lengths=[3], machine={}, clock=clock, is_whole=True, max_rounds=3)
    assert clock.worked[:6] == ["int8.0", "int8.0", "int8.1", "float32.0", "float32.0", "float32.1"]


def test_a_disturbed_round_changes_nothing() -> None:
    clock = Clock()
    steps = {"int8": TimedSteps("int8", (2.0, 3.0), clock)}

    def disturb(text: str, done: float) -> None:
        clock.slowness = 17.0 if len(clock.worked) < 3 * 2 * 6 else 1.0

    found = measure(
        steps, inputs, batches=BATCHES, lengths=LENGTHS, machine={}, clock=clock, progress=disturb, max_rounds=5
    )
    np.testing.assert_allclose(found.through_ms["int8"], expected((2.0, 3.0)))
    np.testing.assert_array_equal(found.router_ms, 0)


@pytest.mark.parametrize(
    ("budget_s", "rounds"),
    # a round of one segment takes 10 ms here
    [(0.0, 3), (0.025, 3), (0.045, 5), (60.0, 7)],
)
def test_the_budget_ends_the_rounds(budget_s: float, rounds: int) -> None:
    clock, told = Clock(), list[tuple[str, float]]()
    measure(
        {"int8": TimedSteps("int8", (5.0,), clock)}, inputs, batches=[1], lengths=[5], machine={}, clock=clock,
        budget_s=budget_s, max_rounds=7, progress=lambda text, done: told.append((text, done)),
    )  # fmt: skip
    assert len(clock.worked) == 1 + rounds
    assert [text for text, _ in told] == ["batch 1, length 5"] * rounds
    done = [one for _, one in told]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] < 1 + 1e-9


def test_times_between_the_measured_points_are_linear() -> None:
    made = table()
    # the fake times are linear in both, so interpolation is exact
    assert made.ms("int8/1", 3, 11) == pytest.approx(0.5 + 2 * 3 + 11)
    assert made.ms("int8/2", 2, 7) == pytest.approx(0.5 + 5 * 2 + 2 * 7)
    batch, length = np.array([1, 2, 6, 7]), np.array([[5], [8], [11]])
    np.testing.assert_allclose(made.ms("float32/1", batch, length), 0.5 + 13 * batch + length)
    one = table({"int8": np.full((1, 1, 1), 3.0)}, batches=(4,), lengths=(9,), router_ms=np.zeros((1, 1)))
    assert one.ms("int8/1", 4, 9) == 3.0


@pytest.mark.parametrize(
    ("batch", "length", "message"),
    [
        (8, 5, "batch=8 lies outside of what was measured, 1 to 7"),
        (1, [5, 4], "length=4 lies outside of what was measured, 5 to 11"),
        (1, float("nan"), "length=nan lies outside"),
    ],
)
def test_no_time_beyond_the_measured_points(batch: int, length: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table().ms("int8/1", batch, length)


@given(
    times=st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=2), min_size=2, max_size=5),
    quality=st.lists(st.integers(0, 2), min_size=5, max_size=5),
)
def test_dominated_paths(times: list[list[int]], quality: list[int]) -> None:
    shape = (len(times), 2, 1)
    made = table(
        {"int8": np.array(times, float).reshape(shape)}, batches=(1, 3), lengths=(5,), router_ms=np.zeros((2, 1))
    )
    names = [f"int8/{depth + 1}" for depth in range(len(times))]
    found = made.dominated(dict(zip(names, map(float, quality), strict=False)))
    values = [(*(-one for one in own), good) for own, good in zip(times, quality, strict=False)]
    for place, name in enumerate(names):
        above = [
            names[other]
            for other in range(len(names))
            if all(a >= b for a, b in zip(values[other], values[place], strict=True))
            and (values[other] != values[place] or other < place)
        ]
        assert (name in found) == bool(above)
        if above:
            assert found[name] in above
            assert found[name] not in found


def test_dominated_compares_only_what_it_is_given() -> None:
    made = table()
    # float32 is the slowest everywhere, and here no better
    assert made.dominated({"float32/1": 0.9, "int8/1": 0.9}) == {"float32/1": "int8/1"}
    assert made.dominated({"float32/1": 0.91, "int8/1": 0.9}) == {}
    with pytest.raises(ConfigError, match="quality of int8/1 is NaN"):
        made.dominated({"float32/1": 0.9, "int8/1": float("nan")})


def test_error_is_that_of_the_worst_path() -> None:
    made = table(router_ms=np.zeros((3, 2)))
    assert made.error(made) == 0
    slower = {"int8": made.through_ms["int8"] * np.array([1.25, 2.0])[:, None, None], "float32": expected((13.0,))}
    # one point does not move the median
    slower["float32"][0, 0, 0] *= 19
    assert made.error(table(slower, router_ms=made.router_ms)) == pytest.approx(0.5)
    assert table(slower, router_ms=made.router_ms).error(made) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"tables of different axes or families: .*'float32': 1.* measure both alike"):
        made.error(table({"int8": expected((2.0, 3.0))}))


def test_json_gives_an_equal_table_back() -> None:
    made = table()
    back = LatencyTable.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert back.to_dict() == made.to_dict()
    assert (back.batches, back.lengths, back.machine) == (BATCHES, LENGTHS, MACHINE)
    np.testing.assert_array_equal(back.through_ms["int8"], made.through_ms["int8"])
    np.testing.assert_array_equal(back.router_ms, made.router_ms)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"form": 2}, "no latency table of form 1"),
        ({"note": "x"}, r"keys \['note'\] are unknown or missing"),
        ({"machine": None}, "machine, through_ms and others_ms must be objects"),
        ({"batches": [1, 3, 7.0]}, "an axis is .* not a list of whole numbers"),
        ({"batches": [1, 3, True]}, "not a list of whole numbers"),
        ({"lengths": [11, 5]}, r"lengths=\[11, 5\] must rise"),
        ({"router_ms": [["1", "2"]] * 3}, "not numbers"),
        ({"router_ms": [[1.0], [2.0, 3.0]]}, "inhomogeneous"),
        ({"router_ms": [[float("nan"), 1.0]] * 3}, r"router_ms must be finite times >= 0 of shape \(3, 2\)"),
        ({"through_ms": {"int8": [[[0.0, 1.0]] * 3]}}, "through_ms of int8 must be finite times > 0"),
        ({"through_ms": {"int8": 3.0}}, r"through_ms of int8 must be .* shape \(1, 3, 2\); it is 3.0"),
        ({"through_ms": {"int8": []}}, "through_ms of int8 must be"),
        ({"through_ms": {"int4": [[[1.0, 1.0]] * 3]}}, "'int4' names no family"),
        ({"through_ms": {}}, "one family at least"),
    ],
)
def test_documents_that_are_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LatencyTable.from_dict(table().to_dict() | values)


def test_a_document_without_a_key_or_that_is_none() -> None:
    document = table().to_dict()
    del document["lengths"]
    with pytest.raises(InputError, match=r"keys \['lengths'\] are unknown or missing"):
        LatencyTable.from_dict(document)
    with pytest.raises(InputError, match="no latency table"):
        LatencyTable.from_dict([document])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batches": ()}, r"batches=\[\] must rise from 1 or more, and hold one at least"),
        ({"lengths": (0, 5)}, r"lengths=\[0, 5\] must rise"),
        ({"router_ms": np.zeros((2, 3))}, "router_ms must be finite times"),
    ],
)
def test_tables_that_are_none(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table(**values)


def test_paths_that_were_not_measured() -> None:
    with pytest.raises(ConfigError, match=r"path 'int8/3' was not measured; .*\{'int8': 2, 'float32': 1\}"):
        table().path_ms("int8/3")
    with pytest.raises(ConfigError, match="path 'int8/1/local' was not measured"):
        table().ms("int8/1/local", 1, 5)
    with pytest.raises(ConfigError, match="family 'int8/local' was not measured; families"):
        table().segment_ms("int8/local")


def test_measuring_needs_families_rising_axes_and_rounds() -> None:
    steps = {"int8": TimedSteps("int8", (1.0,), Clock())}
    with pytest.raises(ConfigError, match="there are no steps to measure"):
        measure({}, inputs, batches=[1], lengths=[5], machine={})
    with pytest.raises(ConfigError, match="'half' names no family"):
        measure({"half": steps["int8"]}, inputs, batches=[1], lengths=[5], machine={})
    with pytest.raises(ConfigError, match=r"batches=\[3, 1\] must rise"):
        measure(steps, inputs, batches=[3, 1], lengths=[5], machine={})
    with pytest.raises(ConfigError, match=r"lengths=\[\] must rise"):
        measure(steps, inputs, batches=[1], lengths=[], machine={})
    with pytest.raises(ConfigError, match="min_rounds=3 must be 1 to max_rounds=2"):
        measure(steps, inputs, batches=[1], lengths=[5], machine={}, max_rounds=2)
