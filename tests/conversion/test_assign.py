"""Assignment of head classes, against an exhaustive search."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from trilevel.attention.levels import LevelRatio
from trilevel.conversion.assign import Array, HeadClass, assign, assign_within, total_error
from trilevel.errors import ConfigError

pytest.importorskip("scipy", reason="scipy comes with the extra 'convert'")
LAYERS, HEADS = 2, 3


def drawn(seed: int) -> Array:
    return np.random.default_rng(seed).random((LAYERS, HEADS, 3))


def every_assignment(num_classes: int) -> list[np.ndarray]:
    return [
        np.array(found).reshape(LAYERS, HEADS) for found in itertools.product(range(num_classes), repeat=LAYERS * HEADS)
    ]


# definition


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_dense", [0, 1, 4])
def test_no_other_assignment_of_these_numbers_loses_less(seed: int, num_dense: int) -> None:
    errors, ratio = drawn(seed), LevelRatio(2, 1, 1) if num_dense < 4 else LevelRatio(1, 1, 0)
    found = assign(errors, ratio, num_dense_heads=num_dense)
    wanted = [*ratio.split(LAYERS * HEADS - num_dense), num_dense]
    assert np.bincount(found.ravel(), minlength=4).tolist() == wanted
    best = min(
        total_error(errors, other)
        for other in every_assignment(4)
        if np.bincount(other.ravel(), minlength=4).tolist() == wanted
    )
    assert total_error(errors, found) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_cheaper_stays_within_the_bound(seed: int) -> None:
    errors, costs = drawn(seed), (1.0, 2.5, 2.0, 9.0)
    found = assign_within(errors, costs, bound=0.8)
    assert total_error(errors, found) <= 0.8 + 1e-9

    def cost(classes: np.ndarray) -> float:
        return sum(costs[c] for c in classes.ravel())

    assert cost(found) == min(cost(o) for o in every_assignment(4) if total_error(errors, o) <= 0.8)


def test_the_error_is_that_of_the_assigned_classes() -> None:
    errors = np.arange(18.0).reshape(LAYERS, HEADS, 3)
    classes = np.array([[0, 1, 2], [HeadClass.DENSE, HeadClass.GLOBAL, HeadClass.LOCAL]])
    assert total_error(errors, classes) == 0 + 4 + 8 + 0 + 14 + 15


# limits


def test_without_error_allowed_every_head_stays_dense() -> None:
    assert (assign_within(drawn(0), (1, 2, 3, 4), bound=0.0) == HeadClass.DENSE).all()
    # below what the solver takes for zero
    assert (assign_within(np.full((2, 3, 3), 1e-8), (1, 2, 3, 4), bound=0.0) == HeadClass.DENSE).all()


def test_a_bound_above_all_errors_gives_the_cheapest_class() -> None:
    assert (assign_within(drawn(0), (2, 1, 3, 4), bound=1e6) == HeadClass.REGIONAL).all()


def test_all_heads_may_stay_dense() -> None:
    assert (assign(drawn(0), LevelRatio(6, 3, 1), num_dense_heads=6) == HeadClass.DENSE).all()


def test_layers_may_differ() -> None:
    errors = np.ones((2, 4, 3))
    # the first layer loses nothing as local heads, the second nothing as regional ones
    errors[0, :, 0] = errors[1, :, 1] = 0
    found = assign(errors, LevelRatio(1, 1, 0))
    assert Counter(found[0]) == {0: 4}
    assert Counter(found[1]) == {1: 4}


# errors


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.full((1, 2, 3), np.nan), np.full((1, 2, 3), -1.0)])
def test_errors_that_are_none_are_refused(bad: Array) -> None:
    with pytest.raises(ConfigError, match="finite and >= 0"):
        assign(bad, LevelRatio(1, 1, 1))


def test_more_dense_heads_than_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be 0 to 6"):
        assign(drawn(0), LevelRatio(1, 1, 1), num_dense_heads=7)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigError, match="bound=-1"):
        assign_within(drawn(0), (1, 1, 1, 1), bound=-1)
