"""Made-up outcome tables whose truth is known: a difficulty decides what each path gets right and how sure it is."""

from __future__ import annotations

import numpy as np

from trilevel.routing.outcomes import Outcomes

PATHS = ("int8/1", "int8/2", "int8/3", "float32/1")
FULL = "float32/1"
FAMILIES = {"int8": PATHS[:3]}
MS = {"int8/1": 1.0, "int8/2": 2.0, "int8/3": 3.0, FULL: 10.0}
CLASSES = 3


def make_outcomes(count: int, *, seed: int = 0, has_labels: bool = True, groups: int | None = None) -> Outcomes:
    """Samples of difficulty 0 to 1; deeper paths err on harder ones alone, and are less sure of them."""
    rng = np.random.default_rng(seed)
    difficulty = rng.random(count)
    labels = rng.integers(0, CLASSES, count)
    full = np.where(rng.random(count) < 0.05, (labels + 1) % CLASSES, labels)
    predictions, margins = np.empty((count, 4), np.int64), np.empty((count, 4))
    for column, skill in enumerate((0.6, 0.85, 0.97, 2.0)):
        sureness = skill - difficulty + 0.05 * rng.standard_normal(count)
        is_wrong = (sureness < 0) & (skill < 2)
        predictions[:, column] = np.where(is_wrong, (full + 1) % CLASSES, full)
        margins[:, column] = np.abs(sureness) * np.where(is_wrong, 0.5, 4.0)
    return Outcomes(
        paths=PATHS,
        full=FULL,
        predictions=predictions,
        margins=margins,
        features=np.stack([difficulty + rng.standard_normal(count), rng.random(count)], 1),
        lengths=rng.integers(1, 100, count),
        groups=np.arange(count) if groups is None else rng.integers(0, groups, count),
        labels=labels if has_labels else None,
    )


def disagreement(outcomes: Outcomes) -> np.ndarray:
    """1 where a path's answer differs from that of the full path, (samples, paths)."""
    found: np.ndarray = (outcomes.predictions != outcomes.full_predictions[:, None]).astype(float)
    return found
