"""The classes of texts."""

from __future__ import annotations

from collections.abc import Iterator

from trilevel.applications.classification.checkpoint import Run
from trilevel.applications.classification.predictions import Item, Prediction, predictions
from trilevel.applications.classification.score import classify


def predict(run: Run, wanted: Iterator[Item]) -> Iterator[Prediction]:
    """Predictions in the order of the items; a thousand are read at a time, so a table may be of any length."""
    return predictions(wanted, run.labels, lambda texts: classify(run, texts).numpy())
