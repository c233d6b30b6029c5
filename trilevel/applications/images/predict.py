"""The classes of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trilevel.applications.images.checkpoint import Run
from trilevel.applications.images.predictions import Prediction, predictions
from trilevel.applications.images.score import classify


def predict(run: Run, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Predictions in the order of the files; each image is resized to what the model reads.

    Raises:
        InputError: a file is missing or no image.
    """
    size = run.model.config.patches.image_size
    return predictions(paths, run.labels, size, lambda pixels: classify(run, pixels).numpy())
