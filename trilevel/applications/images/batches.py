"""Batches of images, shifted and mirrored at random."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from trilevel.errors import ConfigError, InputError


class ImageBatches:
    """Batches of `pixels` uint8 (batch, channels, height, width) and `labels` (batch,), functions of the step alone.

    An epoch is a new order of all images; what does not fill a batch at its end is left out, unless that is all.

    Args:
        pixels: uint8 (images, channels, height, width).
        labels: (images,) whole numbers.
        rows: which images, by place.
        batch_size: images of a batch, where there are as many.
        crop_padding: an image is shifted by up to this many pixels, zeros behind it (a crop of the padded image).
        flip: mirror half of the images, left to right.
        seed: of order, shifts and mirrors.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        *,
        batch_size: int,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        if not len(rows):
            raise InputError("no images to make batches of.")
        if batch_size < 1 or crop_padding < 0:
            raise ConfigError(f"batch_size={batch_size} must be >= 1 and crop_padding={crop_padding} >= 0.")
        self._pixels, self._labels, self._rows = pixels, labels, rows
        self._batch_size = min(batch_size, len(rows))
        self._crop_padding, self._flip, self._seed = crop_padding, flip, seed
        self._order = lru_cache(maxsize=1)(self._make_order)

    @property
    def steps_of_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self._rows) // self._batch_size

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of this step."""
        epoch, place = divmod(step, self.steps_of_epoch)
        start = place * self._batch_size
        rows = self._order(epoch)[start : start + self._batch_size]
        pixels = augment(
            self._pixels[rows],
            crop_padding=self._crop_padding,
            flip=self._flip,
            rng=np.random.default_rng((self._seed, 1, step)),
        )
        return {"pixels": torch.from_numpy(pixels), "labels": torch.from_numpy(self._labels[rows])}

    def _make_order(self, epoch: int) -> np.ndarray:
        # a second number, so that no order and no shift share their random numbers
        return np.random.default_rng((self._seed, 0, epoch)).permutation(self._rows)


def augment(pixels: np.ndarray, *, crop_padding: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Images (batch, channels, height, width), each shifted by up to `crop_padding` and mirrored or not, as a copy."""
    batch, channels, height, width = pixels.shape
    padding = [(0, 0), (0, 0), (crop_padding, crop_padding), (crop_padding, crop_padding)]
    padded = np.pad(pixels, padding)
    down, right = rng.integers(0, 2 * crop_padding + 1, (2, batch))
    down_rows = down[:, None] + np.arange(height)
    right_columns = right[:, None] + np.arange(width)
    if flip:
        is_mirrored = rng.random((batch, 1)) < 0.5
        right_columns = np.where(is_mirrored, right_columns[:, ::-1], right_columns)
    images = np.arange(batch)[:, None, None, None]
    found: np.ndarray = padded[
        images, np.arange(channels)[:, None, None], down_rows[:, None, :, None], right_columns[:, None, None, :]
    ]
    return np.ascontiguousarray(found)
