"""Which head becomes local, regional, global or stays dense: an exact assignment of least total error.

Every head of every layer takes one class. Under a ratio the numbers of heads of each class are given for the whole
model, and layers may differ: a transport problem, solved exactly as a linear assignment of heads to places. With a
bound on the error the cheapest classes within it are an integer program, solved exactly by HiGHS.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from trilevel.attention.levels import LevelRatio
from trilevel.errors import ConfigError, require

Array = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]


class HeadClass(IntEnum):
    """What a head sees; also its place in the arrays of this package."""

    LOCAL = 0
    REGIONAL = 1
    GLOBAL = 2
    DENSE = 3


def assign(errors: Array, ratio: LevelRatio, *, num_dense_heads: int = 0) -> Classes:
    """Classes of all heads with the least sum of errors, in the numbers that a ratio asks for.

    The dense heads are chosen along with the others: they are taken off the whole number before the ratio is applied,
    and cost no error.

    Args:
        errors: (layers, heads, 3), what each head loses as local, regional and global head, finite and >= 0.
        ratio: of the heads that are not dense, over the whole model.
        num_dense_heads: heads of the whole model that keep seeing everything.

    Returns:
        (layers, heads), `HeadClass` values.

    Raises:
        ConfigError: more dense heads than heads, or errors that are no errors.
    """
    errors = _checked(errors)
    layers, heads, _ = errors.shape
    if not 0 <= num_dense_heads <= layers * heads:
        raise ConfigError(f"num_dense_heads={num_dense_heads} must be 0 to {layers * heads}, the heads of the model.")
    counts = [0, 0, 0] if num_dense_heads == layers * heads else list(ratio.split(layers * heads - num_dense_heads))
    places = np.repeat(np.arange(4), [*counts, num_dense_heads])
    optimize = require("scipy.optimize", extra="convert")
    head, place = optimize.linear_sum_assignment(_with_dense(errors).reshape(-1, 4)[:, places])
    classes = np.empty(layers * heads, dtype=np.int64)
    classes[head] = places[place]
    return classes.reshape(layers, heads)


def assign_within(errors: Array, costs: Sequence[float], *, bound: float) -> Classes:
    """The cheapest classes of all heads whose errors sum to at most `bound`; a head may stay dense, at no error.

    Args:
        errors: (layers, heads, 3), as in `assign`.
        costs: of a local, regional, global and dense head, in any unit.
        bound: of the sum of errors, >= 0.

    Returns:
        (layers, heads), `HeadClass` values.

    Raises:
        ConfigError: a bound that is negative or no number, or errors that are no errors.
    """
    errors = _checked(errors)
    if not bound >= 0:
        raise ConfigError(f"bound={bound} must be >= 0: the sum of errors that is allowed.")
    layers, heads, _ = errors.shape
    optimize = require("scipy.optimize", extra="convert")
    flat = _with_dense(errors).reshape(-1)
    one_class_each = np.kron(np.eye(layers * heads), np.ones(4))
    solved = optimize.milp(
        np.tile(np.asarray(costs, dtype=np.float64), layers * heads),
        constraints=[
            optimize.LinearConstraint(one_class_each, 1, 1),
            optimize.LinearConstraint(flat[None], -np.inf, bound),
        ],
        integrality=np.ones_like(flat),
        # a sum may pass its bound by the solver's tolerance, a head that alone passes it may not
        bounds=optimize.Bounds(0, (flat <= bound).astype(np.float64)),
    )
    # all heads dense is always allowed, so there is a solution
    assert solved.success, solved.message
    classes: Classes = solved.x.reshape(layers, heads, 4).argmax(-1)
    return classes


def total_error(errors: Array, classes: Classes) -> float:
    """Sum of the errors of the assigned classes; what `assign` minimises."""
    return float(np.take_along_axis(_with_dense(errors), classes[..., None], -1).sum())


def _with_dense(errors: Array) -> Array:
    return np.concatenate([errors, np.zeros((*errors.shape[:2], 1))], -1)


def _checked(errors: Array) -> Array:
    errors = np.asarray(errors, dtype=np.float64)
    if errors.ndim != 3 or errors.shape[2] != 3 or not (np.isfinite(errors).all() and (errors >= 0).all()):
        raise ConfigError(
            f"errors of shape {errors.shape} must be (layers, heads, 3), finite and >= 0: one error for each class."
        )
    return errors
