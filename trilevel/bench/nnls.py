"""Least squares with coefficients that are not negative, in relative terms."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def nnls(matrix: Array, target: Array) -> Array:
    """The x >= 0 that minimises |matrix x - target|, by the active set method of Lawson and Hanson (1974, chapter 23).

    Args:
        matrix: (points, coefficients).
        target: (points,).
    """
    x, active = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], dtype=bool)
    smallest = 1e-10 * max(1e-300, float(np.abs(matrix.T @ target).max()))
    for _ in range(10 * len(x)):
        slope = np.where(active, -np.inf, matrix.T @ (target - matrix @ x))
        if slope.max() <= smallest:
            break
        active[slope.argmax()] = True
        while True:
            best = np.zeros_like(x)
            best[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            below = active & (best <= 0)
            if not below.any():
                x = best
                break
            # as far towards the best as all stay positive; the one that stops there leaves
            step = x[below] / np.maximum(x[below] - best[below], 1e-300)
            x = x + step.min() * (best - x)
            active &= x > 1e-14 * max(1e-300, float(x.max()))
            x[~active] = 0
    return x


def fit_relative(amounts: Array, measured: Array, rounds: int = 300) -> Array:
    """Rates >= 0 whose predictions `amounts @ rates` have a small largest relative error.

    Relative least squares, repeated with more weight on the points that are far off; the best round counts.

    Args:
        amounts: (points, kinds), >= 0.
        measured: (points,), > 0.
        rounds: of reweighting; 1 is plain relative least squares.
    """
    # kinds differ by ten orders of magnitude
    scale = np.maximum(amounts.max(0), 1e-300)
    relative = amounts / scale / measured[:, None]
    weight = np.ones(len(measured))
    best, lowest = np.zeros(amounts.shape[1]), np.inf
    for _ in range(rounds):
        rates = nnls(relative * weight[:, None], weight)
        errors = np.abs(relative @ rates - 1)
        if errors.max() < lowest:
            best, lowest = rates, float(errors.max())
        # 0.02 keeps points that are met exactly in the fit
        weight *= np.sqrt(errors + 0.02)
        weight /= weight.mean()
    result: Array = best / scale
    return result
