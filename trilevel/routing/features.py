"""What is known of an input before anything is computed, from the arrays that the model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import ConfigError

Arrays = Mapping[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]

TEXT = ("log_tokens", "token_entropy", "repeated_share")
IMAGES = ("brightness", "contrast", "edges", "pixel_entropy")
DOCUMENTS = ("log_tokens", "log_units", "repeated_share")
_BINS = 16


def text_features(arrays: Arrays) -> Floats:
    """Of rows of `input_ids` and `attention_mask` (rows, tokens): (rows, 3), named `TEXT`.

    The logarithm of the length, the entropy of the row's own token frequencies over the largest possible, and the share
    of tokens that occurred before.
    """
    found = np.empty((len(arrays["input_ids"]), len(TEXT)))
    for row, (ids, mask) in enumerate(zip(arrays["input_ids"], arrays["attention_mask"], strict=True)):
        real = ids[mask != 0]
        counts = np.unique(real, return_counts=True)[1]
        found[row] = np.log1p(len(real)), _entropy(counts, len(real)), 1 - len(counts) / max(1, len(real))
    return found


def image_features(arrays: Arrays) -> Floats:
    """Of `pixels` (rows, channels, height, width), 0 to 255: (rows, 4), named `IMAGES`.

    Mean, deviation, mean difference of neighbours (all over 255), and the entropy of 16 shades over the largest.
    """
    pixels = arrays["pixels"].mean(1) / 255
    edges = np.abs(np.diff(pixels, axis=1)).mean((1, 2)) + np.abs(np.diff(pixels, axis=2)).mean((1, 2))
    shades = np.minimum((pixels * _BINS).astype(np.int64), _BINS - 1).reshape(len(pixels), -1)
    entropy = [_entropy(np.bincount(row), _BINS) for row in shades]
    return np.stack([pixels.mean((1, 2)), pixels.std((1, 2)), edges, np.array(entropy)], axis=1)


def document_features(arrays: Arrays) -> Floats:
    """Of rows of `input_ids` (rows, tokens) and `unit_ends` (rows, units): (rows, 3), named `DOCUMENTS`.

    Logarithms of the numbers of tokens and of units, and the share of tokens that occurred before.
    """
    found = np.empty((len(arrays["input_ids"]), len(DOCUMENTS)))
    for row, (ids, ends) in enumerate(zip(arrays["input_ids"], arrays["unit_ends"], strict=True)):
        real = ids[: int(ends.max())]
        units = np.count_nonzero(np.diff(ends, prepend=0) > 0)
        found[row] = np.log1p(len(real)), np.log1p(units), 1 - len(np.unique(real)) / max(1, len(real))
    return found


def _entropy(counts: npt.NDArray[np.integer[Any]], largest: int) -> float:
    """Of shares by counts, over that of `largest` equal ones; 0 for one."""
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum() / np.log(max(2, largest)))


_FEATURES: dict[str, tuple[tuple[str, ...], Callable[[Arrays], Floats]]] = {
    "classification": (TEXT, text_features),
    "images": (IMAGES, image_features),
    "documents": (DOCUMENTS, document_features),
}


def features_of(task: str) -> tuple[tuple[str, ...], Callable[[Arrays], Floats]]:
    """Names of a task's features, and what computes them.

    Raises:
        ConfigError: the task has none.
    """
    if task not in _FEATURES:
        raise ConfigError(f"the task {task!r} is not routed; {', '.join(_FEATURES)} are.")
    return _FEATURES[task]
