"""From image files to what a model says of them, whichever runtime computes; without torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.data.images import Pixels, find_images, read_image, resized
from trilevel.data.json_lines import STDIN, read_lines
from trilevel.errors import InputError

BATCH_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the model says of an image: a label, and the softmax over all labels by name."""

    path: Path
    label: str
    probabilities: dict[str, float]


def files(inputs: Sequence[str]) -> list[Path]:
    """The images behind the arguments of a command: each a file, or a folder with images anywhere below it.

    `-` is standard input, JSON texts, one a line, each the path of a file.

    Raises:
        InputError: a folder holds no image, or a line no text.
    """
    found: list[Path] = []
    for given in inputs:
        if given == STDIN:
            found += map(_of_line, read_lines(sys.stdin))
            continue
        path = Path(given)
        inside = find_images(path) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no image to classify.")
        found += inside
    return found


def _of_line(line: tuple[str, Any]) -> Path:
    where, value = line
    if not isinstance(value, str):
        raise InputError(f"{where}: a {type(value).__name__}; the path of an image, a JSON text, is needed.")
    return Path(value)


def predictions(
    paths: Sequence[Path],
    labels: Sequence[str],
    size: tuple[int, int],
    classify: Callable[[Pixels], npt.NDArray[Any]],
) -> Iterator[Prediction]:
    """Predictions in the order of the files; each image is resized to `size`, height and width.

    Args:
        paths: of images.
        labels: in the order of the classes.
        size: that the model reads.
        classify: uint8 (images, 3, height, width) to probabilities (images, classes).

    Raises:
        InputError: a file is missing or no image.
    """
    for start in range(0, len(paths), BATCH_SIZE):
        some = paths[start : start + BATCH_SIZE]
        for path, chances in zip(some, classify(np.stack([_read(path, size) for path in some])), strict=True):
            named = dict(zip(labels, chances.tolist(), strict=True))
            yield Prediction(path=path, label=labels[int(chances.argmax())], probabilities=named)


def _read(path: Path, size: tuple[int, int]) -> Pixels:
    image = read_image(path)
    return image if image.shape[1:] == size else resized(image, size)
