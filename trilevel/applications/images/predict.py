"""The classes of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trilevel.applications.images.checkpoint import Run
from trilevel.applications.images.score import BATCH_SIZE, classify
from trilevel.data.images import find_images, load_image, resize
from trilevel.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the model says of an image: a label, and the softmax over all labels by name."""

    path: Path
    label: str
    probabilities: dict[str, float]


def files(inputs: Sequence[str]) -> list[Path]:
    """The images behind the arguments of a command: each a file, or a folder with images anywhere below it.

    Raises:
        InputError: a folder holds no image.
    """
    found: list[Path] = []
    for given in inputs:
        path = Path(given)
        inside = find_images(path) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no image to classify.")
        found += inside
    return found


def predict(run: Run, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Predictions in the order of the files; each image is resized to what the model reads.

    Raises:
        InputError: a file is missing or no image.
    """
    size = run.model.config.patches.image_size
    for start in range(0, len(paths), BATCH_SIZE):
        some = paths[start : start + BATCH_SIZE]
        pixels = torch.stack([_resized(path, size) for path in some]).numpy()
        for path, chances in zip(some, classify(run, pixels), strict=True):
            named = dict(zip(run.labels, chances.tolist(), strict=True))
            yield Prediction(path=path, label=run.labels[int(chances.argmax())], probabilities=named)


def _resized(path: Path, size: tuple[int, int]) -> torch.Tensor:
    image = load_image(path)
    return image if tuple(image.shape[1:]) == size else resize(image, size)
