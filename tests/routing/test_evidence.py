"""P-values against sums of exact fractions, and against what a p-value is."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from trilevel.errors import ConfigError, InputError
from trilevel.routing.evidence import betting_p_value, binomial_p_value, samples_needed


def exact(errors: int, samples: int, alpha: Fraction) -> float:
    return float(sum(comb(samples, k) * alpha**k * (1 - alpha) ** (samples - k) for k in range(errors + 1)))


def highest_share(count: int, runs: int) -> float:
    """Lower 95% Clopper-Pearson bound of a share."""
    return 0.0 if not count else float(beta.ppf(0.05, count, runs - count + 1))


# definition


@given(samples=st.integers(0, 60), data=st.data(), percent=st.integers(1, 99))
def test_binomial_is_the_sum(samples: int, data: st.DataObject, percent: int) -> None:
    errors = data.draw(st.integers(0, samples))
    alpha = Fraction(percent, 100)
    assert binomial_p_value(errors, samples, float(alpha)) == pytest.approx(exact(errors, samples, alpha), rel=1e-9)


@settings(deadline=None)
@given(errors=st.integers(0, 40), alpha=st.floats(0.002, 0.6), delta=st.floats(0.001, 0.4))
def test_samples_needed_are_the_fewest(errors: int, alpha: float, delta: float) -> None:
    needed = samples_needed(errors, alpha, delta)
    assert binomial_p_value(errors, needed, alpha) <= delta
    assert needed == errors + 1 or binomial_p_value(errors, needed - 1, alpha) > delta


@pytest.mark.parametrize(
    ("errors", "alpha", "needed"),
    [
        (0, 0.01, 299),
        (1, 0.01, 473),
        (5, 0.01, 1049),
        (50, 0.01, 6323),
        (0, 0.02, 149),
        (20, 0.01, 2902),
        (0, 0.005, 598),
    ],
)
def test_samples_needed_as_published(errors: int, alpha: float, needed: int) -> None:
    assert samples_needed(errors, alpha, 0.05) == needed


# invariants: what a p-value is


@pytest.mark.parametrize("kind", ["rare", "often", "middle", "spread"])
def test_betting_seldom_convicts_the_innocent(kind: str) -> None:
    rng = np.random.default_rng(13)
    draws: dict[str, tuple[float, Callable[[], np.ndarray]]] = {
        "rare": (0.01, lambda: (rng.random(1_009) < 0.01).astype(float)),
        "often": (0.2, lambda: (rng.random(307) < 0.2).astype(float)),
        "middle": (0.505, lambda: 0.5 + 0.5 * rng.choice([-1, 0, 1], 1_009, p=[0.02, 0.95, 0.03])),
        "spread": (0.1, lambda: rng.beta(0.2, 1.8, 503)),
    }
    alpha, draw = draws[kind]
    runs = 1_500
    convicted = sum(betting_p_value(draw(), alpha) <= 0.05 for _ in range(runs))
    assert highest_share(convicted, runs) <= 0.05


@pytest.mark.parametrize(
    ("risk", "samples", "least"), [(0.0, 400, 1.0), (0.002, 2_003, 0.9), (0.005, 6_007, 0.75), (0.012, 2_003, 0.0)]
)
def test_betting_finds_low_risks(risk: float, samples: int, least: float) -> None:
    rng = np.random.default_rng(17)
    found = [betting_p_value((rng.random(samples) < risk).astype(float), 0.01) <= 0.05 for _ in range(200)]
    assert np.mean(found) >= least


def test_small_losses_are_proved_with_fewer_samples_than_errors() -> None:
    rng = np.random.default_rng(19)
    small = 0.004 + 0.002 * rng.random(2_003)
    assert betting_p_value(small, 0.01) <= 0.01
    assert betting_p_value((rng.random(2_003) < 0.005).astype(float), 0.01) > 0.01


def test_no_samples_prove_nothing() -> None:
    assert betting_p_value(np.empty(0), 0.01) == 1.0
    assert binomial_p_value(0, 0, 0.01) == 1.0


# error messages


def test_wrong_arguments() -> None:
    for alpha in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            binomial_p_value(0, 5, alpha)
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            betting_p_value(np.zeros(3), alpha)
    with pytest.raises(ConfigError, match=r"delta=1\.5"):
        samples_needed(0, 0.01, 1.5)
    with pytest.raises(InputError, match="7 errors in 5 samples are no counts"):
        binomial_p_value(7, 5, 0.01)
    with pytest.raises(InputError, match="errors=-1 must be >= 0"):
        samples_needed(-1, 0.01, 0.05)
    for losses in ([0.5, 1.5], [-0.1], [float("nan")]):
        with pytest.raises(InputError, match="one row of numbers from 0 to 1"):
            betting_p_value(np.array(losses), 0.01)
