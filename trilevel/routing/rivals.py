"""What dynamic paths must beat: fixed paths, a blind draw, a choice by length or neighbours, and an oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.routing.outcomes import Outcomes

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
NEIGHBOURS = 25
BINS = 10


def neighbour_harm(known: Floats, losses: Floats, features: Floats) -> Floats:
    """Mean loss of each path among the nearest known inputs, by features in deviations: (samples, paths).

    Args:
        known: (known, features).
        losses: (known, paths).
        features: (samples, features).
    """
    mean, deviation = known.mean(0), np.maximum(known.std(0), 1e-9)
    ours, theirs = (features - mean) / deviation, (known - mean) / deviation
    count = min(NEIGHBOURS, len(known))
    found = np.empty((len(features), losses.shape[1]))
    for row, own in enumerate(ours):
        near = np.argpartition(((theirs - own) ** 2).sum(1), count - 1)[:count]
        found[row] = losses[near].mean(0)
    return found


def binned_harm(known: Floats, losses: Floats, values: Floats) -> Floats:
    """Mean loss of each path among known inputs of a similar value of one feature: (samples, paths).

    This is what a table of thresholds on a length or an entropy can say.

    Args:
        known: (known,).
        losses: (known, paths).
        values: (samples,).
    """
    edges = np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1])
    theirs, ours = np.searchsorted(edges, known), np.searchsorted(edges, values)
    everyone = losses.mean(0)
    means = np.stack([losses[theirs == one].mean(0) if (theirs == one).any() else everyone for one in range(BINS)])
    return np.asarray(means[ours])


def by_harm(harm: Floats, ms: Floats, full: int, price: float) -> Integers:
    """The column that is cheapest with the harm expected at a price: (samples,).

    Args:
        harm: (samples, paths).
        ms: (samples, paths).
        full: the column of the full path, whose harm is 0.
        price: of one full path's time, in harm.
    """
    harm = harm.copy()
    harm[:, full] = 0
    return np.asarray((harm + price * ms / ms[:, [full]]).argmin(1))


def oracle(losses: Floats, ms: Floats) -> Integers:
    """The cheapest path that loses nothing, for each sample: no rule can do better without a loss. (samples,)"""
    return np.asarray(np.where(losses <= 0, ms, np.inf).argmin(1))


def random_mix(columns: Integers, seed: int) -> Integers:
    """The same shares of the paths, drawn blindly: what a rule adds lies above this."""
    return np.random.default_rng(seed).permutation(columns)


def path_ms(outcomes: Outcomes, ms: Mapping[str, npt.ArrayLike]) -> Floats:
    """Milliseconds (samples, paths) from those of each path."""
    return np.stack([np.broadcast_to(ms[path], len(outcomes)) for path in outcomes.paths], axis=1).astype(np.float64)


def picked(matrix: Floats, columns: Integers) -> Floats:
    """One column of each row."""
    return np.asarray(matrix[np.arange(len(columns)), columns])


def names(paths: Sequence[str], columns: Integers) -> dict[str, float]:
    """Share of each path, by name."""
    return {path: float((columns == column).mean()) for column, path in enumerate(paths)}
