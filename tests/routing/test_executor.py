from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trilevel.errors import ConfigError, ShapeError
from trilevel.routing.executor import BatchError, BatchRun, Flags, Floats, Routed, Verdict, execute, run_path
from trilevel.routing.paths import Path, PathSet
from trilevel.routing.steps import Array, Arrays

Sample = tuple[int, ...]
PRIME = 97
# of each segment of a family; the one of bfloat16/local has a segment that no path runs
FACTORS = {"int8": (3, 5, 7, 11), "bfloat16/local": (13, 17, 19), "float32": (23, 29, 31)}
# no path ends behind the third segment of int8
PATHS = PathSet.parse(["int8/1", "int8/2", "int8/4", "bfloat16/2/local", "float32/1", "float32/3"], full="float32/3")
NEVER = 1000


class FakeSteps:
    """Whole numbers modulo a prime, so that a batch changes no digit. It keeps what ran: segments and batches."""

    def __init__(self, factors: tuple[int, ...]) -> None:
        self.factors = factors
        self.sizes: list[tuple[int, int]] = []

    @property
    def num_segments(self) -> int:
        return len(self.factors)

    def run(self, segment: int, arrays: Arrays) -> tuple[Arrays, Array]:
        self.sizes.append((segment, len(arrays["x"])))
        x = (np.cumsum(arrays["x"] * arrays["mask"], axis=1) * self.factors[segment] + segment) % PRIME
        kept = x * arrays["mask"]
        is_last = segment + 1 == self.num_segments
        state = {"nobody reads": np.empty(0)} if is_last else {"x": x, "mask": arrays["mask"]}
        return state, np.stack([kept.sum(1) % PRIME, kept.max(1)], axis=1)


def heads_alone(sample: Sample, family: str, depth: int) -> list[tuple[int, int]]:
    """What the heads say of a sample, value by value."""
    values, said = list(sample), []
    for segment, factor in enumerate(FACTORS[family][:depth]):
        total, new = 0, []
        for value in values:
            total += value
            new.append((total * factor + segment) % PRIME)
        values = new
        said.append((sum(values) % PRIME, max(values)))
    return said


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Begins by the first feature, leaves where the greatest head's answer so far, and the feature, reach a bound."""

    begins: Sequence[str]
    bounds: dict[str, int]

    def start(self, features: Floats) -> list[str]:
        return [self.begins[int(one)] for one in features[:, 0]]

    def after(self, family: str, segment: int, outputs: Array, features: Floats) -> Verdict:
        assert outputs.shape[1:] == (segment + 1, 2)
        margin = outputs[:, :, 0].max(1) + features[:, 0]
        leave: Flags = margin >= self.bounds[f"{family} {segment}"]
        return Verdict(leave, margin)

    def alone(self, sample: Sample) -> tuple[list[tuple[int, int]], str, int, float, list[tuple[str, int]]]:
        """Outputs, path, segments run, margin, and all that runs for one sample."""
        feature = feature_of(sample)
        begin, ran = self.begins[feature], list[tuple[str, int]]()
        if begin != "float32/3":
            for depth in range(1, PATHS.families[begin][-1] + 1):
                ran.append((begin, depth - 1))
                path = "/".join([begin.split("/")[0], str(depth), *begin.split("/")[1:]])
                said = heads_alone(sample, begin, depth)
                if path == "float32/3":
                    return said, path, depth, math.nan, ran
                if path in PATHS.names:
                    margin = max(head for head, _ in said) + feature
                    if margin >= self.bounds[f"{begin} {depth - 1}"]:
                        return said, path, depth, margin, ran
        ran += [("float32", segment) for segment in range(3)]
        return heads_alone(sample, "float32", 3), "float32/3", len(ran), math.nan, ran


def feature_of(sample: Sample) -> int:
    return sum(sample) % 3


def features_of(samples: Sequence[Sample]) -> Floats:
    return np.array([[feature_of(sample)] for sample in samples], dtype=float).reshape(-1, 1)


def padded(sample: Sample) -> int:
    return -(-len(sample) // 4) * 4


def collate(samples: Sequence[Sample], length: int) -> Arrays:
    assert all(len(sample) <= length for sample in samples)
    x, mask = np.full((len(samples), length), 41), np.zeros((len(samples), length), dtype=bool)
    for row, sample in enumerate(samples):
        x[row, : len(sample)], mask[row, : len(sample)] = sample, True
    return {"x": x, "mask": mask}


def fakes() -> dict[str, FakeSteps]:
    return {name: FakeSteps(factors) for name, factors in FACTORS.items()}


SAMPLES = st.lists(st.lists(st.integers(0, PRIME - 1), min_size=1, max_size=9).map(tuple), max_size=40)
RULES = st.builds(
    Rule,
    begins=st.lists(st.sampled_from([*PATHS.families, "float32/3"]), min_size=3, max_size=3),
    bounds=st.fixed_dictionaries(
        {
            f"{family} {depth - 1}": st.sampled_from([0, 40, 70, 90, 96, NEVER])
            for family, depths in PATHS.families.items()
            for depth in depths
        }
    ),
)
MANY = [tuple((7 * i + 3 * j) % PRIME for j in range(1 + i % 9)) for i in range(101)]
BOUNDS = {"int8 0": 90, "int8 1": 93, "int8 3": 95, "bfloat16/local 1": 80, "float32 0": 85}


MIXED = Rule(begins=["int8", "bfloat16/local", "float32/3"], bounds=BOUNDS)


def route(samples: Sequence[Sample], decider: Rule | None, **values: Any) -> list[Routed]:
    given: dict[str, Any] = {"steps": fakes(), "paths": PATHS, "max_batch": 7, "length_of": len, "collate": collate}
    given["features"] = features_of(samples)
    return execute(samples, decider=decider, **{**given, **values})


@given(samples=SAMPLES, rule=RULES, max_batch=st.integers(1, 13), length_of=st.sampled_from([len, padded]))
@example(samples=MANY, rule=MIXED, max_batch=5, length_of=padded)
def test_a_sample_gets_what_it_gets_alone(
    samples: list[Sample], rule: Rule, max_batch: int, length_of: Callable[[Sample], int]
) -> None:
    steps, events = fakes(), list[BatchRun]()
    routed = route(samples, rule, steps=steps, max_batch=max_batch, length_of=length_of, on_batch=events.append)
    visits: Counter[tuple[str, int, int]] = Counter()
    assert len(routed) == len(samples)
    for sample, one in zip(samples, routed, strict=True):
        outputs, path, segments_run, margin, ran = rule.alone(sample)
        assert one.outputs.tolist() == [list(said) for said in outputs]
        assert one.output.tolist() == list(outputs[-1])
        assert (one.path, one.segments_run) == (path, segments_run)
        assert one.is_restarted == (len(ran) > len(outputs))
        np.testing.assert_equal(one.margin, margin)
        visits.update((*step, length_of(sample)) for step in ran)
    done: Counter[tuple[str, int, int]] = Counter()
    for event in events:
        done[event.family, event.segment, event.length] += event.batch
    assert done == visits
    assert sum(one.segments_run for one in routed) == visits.total()
    for family, own in steps.items():
        assert [(event.segment, event.batch) for event in events if event.family == family] == own.sizes
    assert all(1 <= event.batch <= max_batch for event in events)


@given(samples=SAMPLES, bounds=st.lists(st.sampled_from([0, 70, 90, NEVER]), min_size=4, max_size=4))
@example(samples=MANY, bounds=[NEVER] * 4)
def test_segments_run_in_the_fewest_batches_and_hold_few_states(samples: list[Sample], bounds: list[int]) -> None:
    max_batch, waiting, most = 5, Counter[int](), 0

    class Counting(Rule):
        def after(self, family: str, segment: int, outputs: Array, features: Floats) -> Verdict:
            nonlocal most
            verdict = super().after(family, segment, outputs, features)
            waiting[segment] -= len(outputs)
            waiting[segment + 1] += int((~verdict.leave).sum())
            most = max(most, sum(waiting[depth] for depth in (1, 2, 3)))
            return verdict

    rule = Counting(begins=["int8"] * 3, bounds={f"int8 {segment}": bound for segment, bound in enumerate(bounds)})
    paths = PathSet.parse(["int8/1", "int8/2", "int8/3", "int8/4", "float32/3"], full="float32/3")
    steps = fakes()
    route(samples, rule, paths=paths, steps=steps, max_batch=max_batch, length_of=lambda _: 12)
    for family, segments in (("int8", 4), ("float32", 3)):
        for segment in range(segments):
            sizes = [size for ran, size in steps[family].sizes if ran == segment]
            assert len(sizes) == math.ceil(sum(sizes) / max_batch)
    assert most <= 3 * (max_batch - 1) + max_batch


class Leaving(Rule):
    """All of a batch leave but the first few."""

    def after(self, family: str, segment: int, outputs: Array, features: Floats) -> Verdict:
        return Verdict(np.arange(len(outputs)) >= self.bounds[family], np.zeros(len(outputs)))


class Watching(FakeSteps):
    """It keeps how many rows each batch keeps alive."""

    def __init__(self, factors: tuple[int, ...]) -> None:
        super().__init__(factors)
        self.alive: list[int] = []

    def run(self, segment: int, arrays: Arrays) -> tuple[Arrays, Array]:
        x = arrays["x"]
        self.alive.append(len(x if x.base is None else x.base))
        return super().run(segment, arrays)


def test_survivors_of_two_batches_share_one() -> None:
    own = Watching(FACTORS["int8"])
    steps = fakes() | {"int8": own}
    routed = route(
        [(i, 1) for i in range(16)], Leaving(begins=["int8"] * 3, bounds={"int8": 4}), steps=steps, max_batch=8
    )
    # 4 and 4 go on together, 4 of them go on, and pass the third segment, behind which no path ends
    assert own.sizes == [(0, 8), (0, 8), (1, 8), (2, 4), (3, 4)]
    assert own.alive == [8, 8, 8, 4, 4]
    # all 4 restart
    assert steps["float32"].sizes == [(0, 4), (1, 4), (2, 4)]
    assert Counter(one.path for one in routed) == {"int8/1": 8, "int8/2": 4, "float32/3": 4}
    assert [one.segments_run for one in routed if one.is_restarted] == [7] * 4


def test_answers_and_those_that_wait_keep_no_others_in_memory() -> None:
    own = Watching(FACTORS["int8"])
    rule = Leaving(begins=["int8"] * 3, bounds={"int8": 6})
    routed = route([(i, 1) for i in range(16)], rule, steps=fakes() | {"int8": own}, max_batch=8)
    # of 6 and 6 that go on, 8 run and 4 wait
    assert own.sizes[:4] == [(0, 8), (0, 8), (1, 8), (1, 4)]
    assert own.alive[:4] == [8, 8, 12, 4]
    assert all(one.outputs.base is None for one in routed)


def test_without_a_rule_everything_takes_the_full_path() -> None:
    routed = route(MANY, None, features=None)
    assert {one.path for one in routed} == {"float32/3"}
    assert [one.outputs.tolist() for one in routed] == [
        [list(said) for said in heads_alone(sample, "float32", 3)] for sample in MANY
    ]
    assert all(math.isnan(one.margin) for one in routed)
    assert route([], None) == route([], MIXED) == []


def test_run_path_gives_every_head_of_every_sample() -> None:
    steps, events = FakeSteps(FACTORS["int8"]), list[BatchRun]()
    found = run_path(
        MANY, steps, Path.parse("int8/3"), max_batch=8, length_of=padded, collate=collate, on_batch=events.append
    )
    assert found.shape == (101, 3, 2)
    assert found.tolist() == [[list(said) for said in heads_alone(sample, "int8", 3)] for sample in MANY]
    assert sum(size for _, size in steps.sizes) == sum(event.batch for event in events) == 3 * 101
    assert max(size for _, size in steps.sizes) == 8


def test_batches_are_told_with_their_time() -> None:
    ticks = iter(range(100))
    events: list[BatchRun] = []
    route([(1, 2, 3), (4, 5, 6)], None, on_batch=events.append, clock=lambda: next(ticks) ** 2)
    # the squares of 0, 1 and 2, 3 and 4, 5
    assert events == [BatchRun("float32", segment, 2, 3, seconds) for segment, seconds in enumerate((1.0, 5.0, 9.0))]


class Breaking(FakeSteps):
    """Its second segment cannot run a batch in which a sample began with 13."""

    def run(self, segment: int, arrays: Arrays) -> tuple[Arrays, Array]:
        first = arrays.get("first", arrays["x"][:, 0])
        if segment == 1 and (first == 13).any():
            raise RuntimeError("13 brings bad luck")
        state, outputs = super().run(segment, arrays)
        return state | {"first": first}, outputs


def test_a_batch_that_fails_names_its_samples_and_loses_no_others() -> None:
    samples = [(i % 17, 2) for i in range(23)]
    steps = fakes() | {"float32": Breaking(FACTORS["float32"])}
    with pytest.raises(
        BatchError, match=r"5 of 23 samples have no answer, .*: 10, 11, 12, 13, 14\. Sample 10"
    ) as caught:
        route(samples, None, steps=steps, max_batch=5)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert set(caught.value.failed) == {10, 11, 12, 13, 14}
    assert "RuntimeError: 13 brings bad luck" in str(caught.value)
    for row, one in enumerate(caught.value.routed):
        if row in caught.value.failed:
            assert one is None
        else:
            assert one is not None
            assert one.output.tolist() == list(heads_alone(samples[row], "float32", 3)[-1])


def test_failed_samples_do_not_restart() -> None:
    samples = [(i % 17, 2) for i in range(23)]
    rule = Rule(begins=["int8"] * 3, bounds={f"int8 {segment}": NEVER for segment in range(4)})
    steps = fakes() | {"int8": Breaking(FACTORS["int8"])}
    with pytest.raises(BatchError, match="5 of 23 samples") as caught:
        route(samples, rule, steps=steps, max_batch=5)
    assert [one is None for one in caught.value.routed] == [row in range(10, 15) for row in range(23)]
    assert sum(size for _, size in steps["float32"].sizes) == 3 * 18


def test_collate_must_pad_to_the_length() -> None:
    def to_the_longest(samples: Sequence[Sample], length: int) -> Arrays:
        return collate(samples, max(map(len, samples)))

    class Holding(Rule):
        """The first of a batch leaves, so that the second waits."""

        def after(self, family: str, segment: int, outputs: Array, features: Floats) -> Verdict:
            return Verdict(np.arange(len(outputs)) == 0, np.zeros(len(outputs)))

    samples = [(1, 2), (1, 2, 3), (1,), (1, 2)]
    rule = Holding(begins=["int8"] * 3, bounds={})
    with pytest.raises(BatchError, match=r"states of one length differ in shape: .*\(3,\).*Let collate pad to it"):
        route(samples, rule, collate=to_the_longest, length_of=padded, max_batch=2)


def test_steps_must_keep_the_batch() -> None:
    class Losing(FakeSteps):
        def run(self, segment: int, arrays: Arrays) -> tuple[Arrays, Array]:
            state, outputs = super().run(segment, arrays)
            return state, outputs[:-1]

    with pytest.raises(BatchError, match=r"float32 segment 0 gave \{'outputs': \(1, 2\)\} for a batch of 2 samples"):
        route([(1, 2), (3, 4)], None, steps=fakes() | {"float32": Losing(FACTORS["float32"])})


@pytest.mark.parametrize("verdict", [Verdict(np.ones(2, int), np.ones(2)), Verdict(np.ones(1, bool), np.ones(1))])
def test_a_verdict_is_one_bool_for_each(verdict: Verdict) -> None:
    class Wrong(Rule):
        def after(self, family: str, segment: int, outputs: Array, features: Floats) -> Verdict:
            return verdict

    with pytest.raises(BatchError, match=r"the rule gave leave .* it must give bools and numbers of the shape \(2,\)"):
        route([(1, 2), (3, 4)], Wrong(begins=["int8"] * 3, bounds={}))


def test_what_cannot_be_run() -> None:
    samples = [(1, 2, 3)]
    with pytest.raises(ConfigError, match="max_batch=0 must be >= 1"):
        route(samples, None, max_batch=0)
    with pytest.raises(ShapeError, match="features has 2 rows for 1 samples; give one row for each"):
        route(samples, None, features=np.zeros((2, 1)))
    with pytest.raises(
        ConfigError, match=r"there are no steps for the paths int8/4, float32/1, float32/3; .*'int8': 3"
    ):
        route(samples, None, steps={"int8": FakeSteps((1, 2, 3)), "bfloat16/local": FakeSteps((1, 2))})
    with pytest.raises(
        ConfigError, match=r"unknown ones: \['int8/2'\]; it must name one for each, of int8, .*float32/3\."
    ):
        route(samples, Rule(begins=["int8/2"] * 3, bounds={}))


def test_a_rule_names_a_beginning_for_each() -> None:
    class Short(Rule):
        def start(self, features: Floats) -> list[str]:
            return ["int8"]

    with pytest.raises(ConfigError, match=r"the rule named 1 beginnings for 2 samples, unknown ones: \[\]"):
        route([(1, 2), (3, 4)], Short(begins=[], bounds={}))


def test_run_path_needs_samples_depth_and_one_shape() -> None:
    class Ragged(FakeSteps):
        def run(self, segment: int, arrays: Arrays) -> tuple[Arrays, Array]:
            state, _ = super().run(segment, arrays)
            return state, arrays["x"]

    def run(samples: list[Sample], steps: FakeSteps, path: str) -> Array:
        return run_path(samples, steps, Path.parse(path), max_batch=2, length_of=len, collate=collate)

    with pytest.raises(ConfigError, match="there are no samples to run; give at least one"):
        run([], FakeSteps((2,)), "int8/1")
    with pytest.raises(ConfigError, match=r"no steps for the paths int8/2; families and their segments: \{'int8': 1\}"):
        run([(1, 2)], FakeSteps((2,)), "int8/2")
    with pytest.raises(
        ShapeError, match=r"outputs differ in shape .*\(1, 2\), \(1, 3\).*execute\(\.\.\., decider=None\)"
    ):
        run([(1, 2), (1, 2, 3)], Ragged((2,)), "int8/1")
