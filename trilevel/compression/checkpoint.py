"""Compressed weights on disk: read with stored integers where the file holds some."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from torch import nn

from trilevel.compression.quantize import load_frozen
from trilevel.errors import CheckpointError, require
from trilevel.model.checkpoint import MODEL_FILE, Checkpoint, load_checkpoint, read_tensors
from trilevel.model.folder import read_manifest

Model = TypeVar("Model", bound=nn.Module)


def holds_integers(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a frozen model."""
    return any(name.rpartition(".")[2] in ("weight_int8", "packed") for name in names)


def load_compressed(folder: str | Path, model: Model) -> tuple[Model, Checkpoint]:
    """The model of a checkpoint, with stored integers where it is quantized; and what else the checkpoint says.

    Args:
        folder: what `save_checkpoint` wrote, of a model as it is, pruned or frozen.
        model: built from the checkpoint's configuration; takes the weights, unless a copy with integers does.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    loaded = load_checkpoint(folder)
    if not holds_integers(_names(loaded.path / MODEL_FILE)):
        return model, load_checkpoint(folder, model=model)
    weights = read_tensors(loaded.path, MODEL_FILE, read_manifest(loaded.path))
    try:
        frozen = load_frozen(model, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{loaded.path}: {error}") from error
    return frozen, loaded  # type: ignore[return-value]  # of the class of the model, some of its parts replaced


def _names(file: Path) -> list[str]:
    """Names of the tensors of a file; none where it is missing or damaged, which reading it will say."""
    try:
        with require("safetensors", extra="train").safe_open(str(file), framework="pt") as tensors:
            return list(tensors.keys())
    # safetensors raises a class of its own, derived from Exception alone
    except Exception:
        return []
