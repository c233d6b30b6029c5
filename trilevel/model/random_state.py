"""The state of the random generators as tensors and JSON types, without pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilevel.errors import CheckpointError


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of torch (CPU and CUDA), numpy (its global generator) and Python: tensors, and JSON values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - the global generator is meant
    version, words, next_gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    values = {
        "numpy": [str(name), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
    }
    return tensors, values


def set_random_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Set the generators to what `random_state` gave; CUDA devices that are not here are passed over.

    Raises:
        CheckpointError: a part is missing or makes no state.
    """
    try:
        name, position, has_gauss, gauss = values["numpy"]
        version, words, next_gauss = values["python"]
        keys = tensors["numpy"].numpy().astype(np.uint32)
        torch.set_rng_state(tensors["torch"])
        np.random.set_state((name, keys, position, has_gauss, gauss))  # noqa: NPY002
        random.setstate((version, tuple(words), next_gauss))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the random state of the checkpoint cannot be used ({error!r}). Restore it.") from error
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
