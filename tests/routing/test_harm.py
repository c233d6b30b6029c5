"""Curves of harm: that they find the truth they were drawn from, and what they say at their ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilevel.errors import InputError
from trilevel.routing.harm import NEVER, FeatureHarm, MarginHarm, fit_feature_harm, fit_margin_harm


def test_the_curve_that_margins_were_drawn_from() -> None:
    rng = np.random.default_rng(5)
    margins = rng.exponential(2.0, 20_011)
    truth = MarginHarm(intercept=-0.5, slope=1.7)
    losses = (rng.random(len(margins)) < truth.harm(margins)).astype(float)
    found = fit_margin_harm(margins, losses)
    assert found.intercept == pytest.approx(-0.5, abs=0.15)
    assert found.slope == pytest.approx(1.7, abs=0.15)


def test_the_plane_that_features_were_drawn_from() -> None:
    rng = np.random.default_rng(7)
    features = rng.standard_normal((20_011, 3)) * [1, 5, 0.1] + [0, 100, -3]
    truth = FeatureHarm(mean=(0, 100, -3), deviation=(1, 5, 0.1), weights=(1.0, -0.5, 0.0), intercept=-1.0)
    losses = (rng.random(len(features)) < truth.harm(features)).astype(float)
    found = fit_feature_harm(features, losses)
    assert found.weights == pytest.approx(truth.weights, abs=0.08)
    assert found.intercept == pytest.approx(-1.0, abs=0.08)
    assert FeatureHarm.from_dict(found.to_dict()) == found


@given(
    intercept=st.floats(-15, 15),
    slope=st.floats(0, 20),
    harm=st.floats(1e-6, 0.999),
)
def test_the_least_margin_is_where_harm_falls_below(intercept: float, slope: float, harm: float) -> None:
    curve = MarginHarm(intercept=intercept, slope=slope)
    margin = curve.least_margin(harm)
    if margin < NEVER:
        assert curve.harm(np.array([margin]))[0] <= harm * (1 + 1e-6)
    else:
        assert curve.harm(np.array([0.0]))[0] > harm
    if 1e-3 < margin < NEVER and slope > 1e-3:
        assert curve.harm(np.array([margin - 1e-3]))[0] >= harm * (1 - 1e-6)


def test_ends() -> None:
    curve = MarginHarm(intercept=0.0, slope=1.0)
    assert curve.least_margin(0.0) == NEVER
    assert curve.least_margin(1.0) == 0.0
    assert curve.least_margin(0.7) == 0.0
    always = fit_margin_harm(np.array([1.0, 2.0, 3.0]), np.zeros(3))
    assert always.harm(np.array([0.0]))[0] < 0.3
    # surer and worse is noise: the curve is flat at the mean
    odd = fit_margin_harm(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert odd.slope == 0
    assert odd.harm(np.array([0.0, 9.0])) == pytest.approx([0.5, 0.5])


def test_no_samples() -> None:
    with pytest.raises(InputError, match="no sample to fit harm on"):
        fit_margin_harm(np.empty(0), np.empty(0))
    with pytest.raises(InputError, match="no sample to fit harm on"):
        fit_feature_harm(np.empty((0, 2)), np.empty(0))
