"""P-values: how strongly held-out losses speak against a risk that is too high, and how many of them it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import ConfigError, InputError, require

Floats = npt.NDArray[np.floating[Any]]
_MOST_SAMPLES = 1 << 40


def binomial_p_value(errors: int, samples: int, alpha: float) -> float:
    """Chance of so few errors if the risk were alpha: P(Bin(samples, alpha) <= errors), exact.

    Raises:
        ConfigError: alpha is not between 0 and 1.
        InputError: the counts are no counts.
        MissingExtraError: scipy is not installed.
    """
    _check_alpha(alpha)
    if not 0 <= errors <= samples:
        raise InputError(f"{errors} errors in {samples} samples are no counts.")
    return float(require("scipy.stats", extra="routing").binom.cdf(errors, samples, alpha))


def betting_p_value(losses: Floats, alpha: float) -> float:
    """P-value of "the mean is alpha or more" for independent losses in [0, 1], (samples,).

    A gambler bets on each loss in turn that it is below alpha; the stake follows from those before. If the mean is
    alpha or more the capital is hardly ever large (Waudby-Smith and Ramdas 2024, arXiv 2010.09686, hedging one side),
    and one over the largest capital is the p-value.

    Raises:
        ConfigError: alpha is not between 0 and 1.
        InputError: a loss lies outside of [0, 1].
    """
    _check_alpha(alpha)
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 1 or not ((losses >= 0) & (losses <= 1)).all():
        raise InputError("losses must be one row of numbers from 0 to 1.")
    if not len(losses):
        return 1.0
    capital = np.cumsum(np.log1p(_stakes(losses, alpha) * (alpha - losses)))
    return float(min(1.0, np.exp(-max(0.0, capital.max()))))


def _stakes(losses: Floats, alpha: float) -> Floats:
    """What is bet before each loss is seen: what makes the capital of a 0-or-1 loss grow fastest, by what came before.

    No single loss takes more than 95% of the capital.
    """
    count = np.arange(1, len(losses) + 1)
    # begun with one loss of alpha, of a small variance
    mean = (alpha + np.cumsum(losses)) / (count + 1)
    variance = (0.25 * alpha + np.cumsum((losses - mean) ** 2)) / (count + 1)
    mean, variance = (np.concatenate([[first], x[:-1]]) for first, x in ((alpha, mean), (0.25 * alpha, variance)))
    gap = np.maximum(0.0, alpha - mean)
    wanted = gap / np.maximum(variance + gap * (1 - 2 * alpha) + gap**2, 1e-12)
    return np.asarray(np.minimum(wanted, 0.95 / (1 - alpha)))


def samples_needed(errors: int, alpha: float, delta: float) -> int:
    """The fewest samples of which so many errors prove a risk below alpha, but for a chance of delta.

    >>> samples_needed(0, 0.01, 0.05), samples_needed(5, 0.01, 0.05)
    (299, 1049)

    Raises:
        ConfigError: alpha or delta is not between 0 and 1.
        InputError: errors is below 0.
    """
    _check_alpha(alpha)
    _check_alpha(delta, "delta")
    if errors < 0:
        raise InputError(f"errors={errors} must be >= 0.")
    low, high = errors, max(1, 2 * errors)
    while binomial_p_value(errors, high, alpha) > delta:
        low, high = high, 2 * high
        if high > _MOST_SAMPLES:
            raise ConfigError(f"alpha={alpha} cannot be proved with any number of samples.")
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_p_value(errors, middle, alpha) > delta:
            low = middle
        else:
            high = middle
    return high


def _check_alpha(value: float, name: str = "alpha") -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{name}={value} must lie between 0 and 1.")
