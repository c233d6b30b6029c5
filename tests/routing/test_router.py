"""The router: an oracle walks its rule sample by sample; prices order settings; JSON gives it back."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.routing.samples import FAMILIES, FULL, MS, disagreement, make_outcomes
from trilevel.errors import ArtifactError, ConfigError, InputError
from trilevel.routing.harm import NEVER
from trilevel.routing.outcomes import Outcomes
from trilevel.routing.router import Router, choose, fit_router, margin, prices, settings, thresholds

OUTCOMES = make_outcomes(2_003)
ROUTER = fit_router(OUTCOMES, disagreement(OUTCOMES), FAMILIES, ("difficulty", "noise"))


def walk(outcomes: Outcomes, setting: dict[str, float], row: int) -> tuple[str, float]:
    """Where a sample ends and what it took, from the docstring of `Router` alone."""
    (rule,) = ROUTER.families
    spent = 0.0
    if all(setting[path] >= NEVER for path in rule.paths):
        return FULL, MS[FULL]
    if rule.start.harm(outcomes.features[row : row + 1])[0] <= setting["int8/start"]:
        for path in rule.paths:
            spent = MS[path]
            if outcomes.margins[row, outcomes.column(path)] >= setting[path]:
                return path, spent
    return FULL, spent + MS[FULL]


# definition


@given(price=st.floats(0, 12))
def test_choosing_is_a_walk(price: float) -> None:
    outcomes, setting = OUTCOMES.rows(slice(0, 97)), thresholds(ROUTER, price, MS)
    found = choose(outcomes, ROUTER, setting)
    cost = found.cost(outcomes, ROUTER, MS)
    for row in range(len(outcomes)):
        path, spent = walk(outcomes, setting, row)
        assert outcomes.paths[found.column[row]] == path
        assert cost[row] == pytest.approx(spent)


def test_margins_are_those_of_the_two_best() -> None:
    logits = np.random.default_rng(3).standard_normal((5, 7, 4))
    ordered = np.sort(logits, axis=-1)
    np.testing.assert_allclose(margin(logits), ordered[..., -1] - ordered[..., -2])


# limits


def test_a_price_of_nothing_takes_the_full_path() -> None:
    setting = thresholds(ROUTER, 0.0, MS)
    found = choose(OUTCOMES, ROUTER, setting)
    assert {OUTCOMES.paths[column] for column in found.column} == {FULL}
    assert not found.is_escalated.any()
    np.testing.assert_allclose(found.cost(OUTCOMES, ROUTER, MS), MS[FULL])


def test_a_price_above_all_harm_takes_the_cheapest() -> None:
    found = choose(OUTCOMES, ROUTER, thresholds(ROUTER, 1e6, MS))
    assert set(found.column) == {0}


# invariants


def test_settings_become_cheaper_and_riskier() -> None:
    found = settings(OUTCOMES, ROUTER, MS)
    assert len(found) > 10
    losses = disagreement(OUTCOMES)
    chosen = [choose(OUTCOMES, ROUTER, setting) for setting in found]
    costs = [one.cost(OUTCOMES, ROUTER, MS).mean() for one in chosen]
    risks = [losses[np.arange(len(OUTCOMES)), one.column].mean() for one in chosen]
    assert risks[0] == 0
    assert all(later < earlier for earlier, later in pairwise(costs))
    assert np.mean(np.diff(risks) >= 0) > 0.9
    # the margin finds the easy samples: below half the cost at a loss of a hundredth
    cheap = [cost for cost, risk in zip(costs, risks, strict=True) if risk <= 0.01]
    assert min(cheap) < 0.5 * MS[FULL]
    assert prices()[0] == 0
    assert (np.diff(prices()) > 0).all()


def test_json_gives_it_back() -> None:
    again = Router.from_dict(json.loads(json.dumps(ROUTER.to_dict())))
    assert again == ROUTER
    assert again.sha256 == ROUTER.sha256
    other = fit_router(OUTCOMES.rows(slice(0, 1_001)), disagreement(OUTCOMES)[:1_001], FAMILIES, ("a", "b"))
    assert other.sha256 != ROUTER.sha256


# error messages


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "no trilevel-router of version 1, but 'trilevel-router' of 2"),
        ({"format": "x"}, "but 'x' of 1"),
        ({"families": [{}]}, "the router is damaged"),
        ({"families": 3}, "the router is damaged"),
    ],
)
def test_what_is_no_router(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        Router.from_dict(ROUTER.to_dict() | change)


def test_paths_without_a_rule() -> None:
    values = ROUTER.to_dict()
    values["families"][0]["exits"].pop()
    with pytest.raises(ArtifactError, match="paths without a rule"):
        Router.from_dict(values)


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match=r"price=-1 must be >= 0"):
        thresholds(ROUTER, -1, MS)
    with pytest.raises(ConfigError, match=r"no time is known for \['float32/1'\]"):
        thresholds(ROUTER, 1, dict.fromkeys(FAMILIES["int8"], 1.0))
    with pytest.raises(InputError, match="there is no path 'int4/1'"):
        fit_router(OUTCOMES, disagreement(OUTCOMES), {"int4": ["int4/1"]}, ())
