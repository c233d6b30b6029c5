"""Logits of images, in the order they were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilevel.applications.images.checkpoint import Run
from trilevel.data import images

BATCH_SIZE = 128


def logits_of(
    model: nn.Module, pixels: np.ndarray, *, on_progress: Callable[[int], None] = lambda _done: None
) -> Tensor:
    """Logits (images, classes), on the CPU, of uint8 (images, channels, height, width); `on_progress` is told how many
    images are done.

    Channels are made those of the model. The mode of the model is left as it is; it is in evaluation mode where results
    shall be the same each time.
    """
    settings: Any = model.config
    device = next(model.parameters()).device
    found = torch.empty(len(pixels), len(settings.labels))
    with torch.inference_mode():
        for start in range(0, len(pixels), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            # a copy: torch takes no array that cannot be written
            some = with_channels(torch.from_numpy(np.array(pixels[rows])), settings.patches.num_channels)
            found[rows] = model(some.to(device)).float().cpu()
            on_progress(min(rows.stop, len(pixels)))
    return found


def classify(run: Run, pixels: np.ndarray, *, on_progress: Callable[[int], None] = lambda _done: None) -> Tensor:
    """Probabilities (images, classes): softmax of the logits in float64, not calibrated; classes as in `run.labels`."""
    return torch.softmax(logits_of(run.model, pixels, on_progress=on_progress).double(), dim=-1)


def with_channels(pixels: Tensor, num_channels: int) -> Tensor:
    """Bytes (images, channels, height, width) with one channel, grey, or three."""
    return torch.from_numpy(images.with_channels(pixels.numpy(), num_channels))
