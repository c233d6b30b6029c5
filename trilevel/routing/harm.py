"""How likely a cheap answer does harm, from how sure it is or from what is known before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import InputError, require

Floats = npt.NDArray[np.floating]
NEVER = 1e9
"""A margin that no answer has; JSON knows no infinity."""
_SHRINKAGE = 1e-3


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -60, 60))))


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginHarm:
    """Harm of an answer by its margin: sigmoid(intercept - slope * margin), falling.

    A margin is the difference of the two largest logits. Of all signals it tells best which answers a deeper path would
    change; what is known of the input tells next to nothing.
    """

    intercept: float
    slope: float

    def harm(self, margins: Floats) -> Floats:
        """Probability of harm, of the shape of `margins`."""
        return _sigmoid(self.intercept - self.slope * margins)

    def least_margin(self, harm: float) -> float:
        """The margin from which harm is at most this; `NEVER` where there is none."""
        if harm >= 1:
            return 0.0
        if harm <= 0 or self.slope <= 0:
            return 0.0 if harm > 0 and self.harm(np.zeros(1))[0] <= harm else NEVER
        margin = (self.intercept - math.log(harm / (1 - harm))) / self.slope
        return min(max(0.0, margin), NEVER)

    def to_dict(self) -> dict[str, float]:
        """JSON types."""
        return asdict(self)


def fit_margin_harm(margins: Floats, losses: Floats) -> MarginHarm:
    """The most likely curve for answers with these margins (samples,) and losses in [0, 1] (samples,).

    Raises:
        InputError: there is no sample.
        MissingExtraError: scipy is not installed.
    """
    intercept, slopes = _logistic(-np.asarray(margins, np.float64)[:, None], losses)
    # a surer answer that does more harm is noise
    if slopes[0] < 0:
        mean = float(np.clip(np.mean(losses), 1e-6, 1 - 1e-6))
        return MarginHarm(intercept=math.log(mean / (1 - mean)), slope=0.0)
    return MarginHarm(intercept=intercept, slope=float(slopes[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureHarm:
    """Harm by what is known of the input: sigmoid(intercept + weights * (features - mean) / deviation)."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float

    def harm(self, features: Floats) -> Floats:
        """Probability of harm (samples,) of features (samples, features)."""
        normal = (np.asarray(features, np.float64) - np.array(self.mean)) / np.array(self.deviation)
        return _sigmoid(self.intercept + normal @ np.array(self.weights))

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeatureHarm:
        """What `to_dict` made."""
        lists = {name: tuple(map(float, values[name])) for name in ("mean", "deviation", "weights")}
        return cls(**lists, intercept=float(values["intercept"]))


def fit_feature_harm(features: Floats, losses: Floats) -> FeatureHarm:
    """The most likely one for inputs with these features (samples, features) and losses in [0, 1] (samples,).

    Raises:
        InputError: there is no sample.
        MissingExtraError: scipy is not installed.
    """
    features = np.asarray(features, np.float64)
    if not len(features):
        raise InputError("no sample to fit harm on.")
    mean, deviation = features.mean(0), np.maximum(features.std(0), 1e-9)
    intercept, weights = _logistic((features - mean) / deviation, losses)
    return FeatureHarm(
        mean=tuple(mean.tolist()),
        deviation=tuple(deviation.tolist()),
        weights=tuple(weights.tolist()),
        intercept=intercept,
    )


def _logistic(x: Floats, losses: Floats) -> tuple[float, Floats]:
    """Intercept and slopes of a logistic regression with a little shrinkage of the slopes."""
    losses = np.asarray(losses, np.float64)
    if not len(losses):
        raise InputError("no sample to fit harm on.")
    optimize = require("scipy.optimize", extra="routing")

    def loss(parameters: Floats) -> tuple[float, Floats]:
        logits = parameters[0] + x @ parameters[1:]
        slope = (_sigmoid(logits) - losses) / len(losses)
        value = np.mean(np.logaddexp(0, logits) - losses * logits) + 0.5 * _SHRINKAGE * parameters[1:] @ parameters[1:]
        return float(value), np.concatenate([[slope.sum()], x.T @ slope + _SHRINKAGE * parameters[1:]])

    # one harm and one harmless answer beside those seen, so that a path that never errs has a finite intercept
    mean = (losses.sum() + 0.5) / (len(losses) + 1)
    start = np.concatenate([[math.log(mean / (1 - mean))], np.zeros(x.shape[1])])
    bounds = [(-20.0, 20.0)] + [(-50.0, 50.0)] * x.shape[1]
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(found[0]), found[1:]
