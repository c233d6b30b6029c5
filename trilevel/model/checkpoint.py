"""Checkpoints: a folder of safetensors and JSON, written atomically, refused when anything in it is not as written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trilevel.errors import CheckpointError, require
from trilevel.model.folder import (
    CONFIG_FILE,
    check_names,
    checked_file,
    find_folder,
    read_manifest,
    sha256_of,
    write_folder,
)
from trilevel.model.optimizer_state import flatten_optimizer, restore_optimizer
from trilevel.model.random_state import random_state, set_random_state

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
STATE_FILE = "state.json"
FILES = {MODEL_FILE, OPTIMIZER_FILE, RANDOM_FILE, STATE_FILE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint says besides its tensors: where it is, the configuration and state given when it was saved."""

    path: Path
    config: dict[str, Any]
    state: dict[str, Any]


def weights_sha256(folder: str | Path) -> str:
    """The hash of the weights in the checkpoint `folder`, which is there."""
    found = find_folder(Path(folder))
    assert found is not None
    return sha256_of(found / MODEL_FILE)


def save_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module,
    config: Mapping[str, Any],
    optimizer: Optimizer | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint, replacing one that is there only when the new one is whole.

    Weights alone without `optimizer` and `state`; with either, the random state (torch, numpy, Python) is saved too.

    Args:
        folder: the checkpoint's folder; its parent is made if needed.
        model: whose `state_dict` is saved.
        config: JSON types, enough to build the model again.
        optimizer: whose state is saved.
        state: JSON types, such as the step.

    Raises:
        CheckpointError: `config` or `state` is no JSON, or the disk is full, ...; an old checkpoint stays whole.
    """
    where = Path(folder)
    if where.exists() and any(where.iterdir() if where.is_dir() else [where]) and not (where / CONFIG_FILE).is_file():
        raise CheckpointError(f"{where} exists and is no checkpoint; it is left alone. Choose another folder.")
    files: dict[str, Callable[[Path], None]] = {MODEL_FILE: partial(write_tensors, model.state_dict())}
    if optimizer is not None or state is not None:
        tensors, plain = random_state()
        values: dict[str, Any] = {"state": dict(state or {}), "random": plain}
        files[RANDOM_FILE] = partial(write_tensors, tensors)
        if optimizer is not None:
            moments, values["optimizer"] = flatten_optimizer(optimizer)
            files[OPTIMIZER_FILE] = partial(write_tensors, moments)
        text = _json(values, "state")
        files[STATE_FILE] = lambda path: _write_text(path, text)
    write_folder(where, files, json.loads(_json(dict(config), "config")))
    return where


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration that was saved, to build the model with.

    Raises:
        CheckpointError: there is no checkpoint, or not one that this version reads.
    """
    return _manifest(folder)[1]["config"]  # type: ignore[no-any-return]


def load_checkpoint(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    restore_random: bool = False,
) -> Checkpoint:
    """Read a checkpoint into `model` and `optimizer`, in place; each file's hash is compared first.

    Args:
        folder: what `save_checkpoint` wrote.
        model: takes the weights; every name and shape must agree.
        optimizer: takes the optimizer's state.
        restore_random: set the random generators as they were.

    Raises:
        CheckpointError: nothing is there; a file is missing, changed or outside the folder; a weight is missing,
            unknown or of another shape; the optimizer is another one. `model` is unchanged then.
    """
    path, manifest = _manifest(folder)
    values = _read_state(path, manifest)
    weights = None if model is None else read_tensors(path, MODEL_FILE, manifest)
    if model is not None and weights is not None:
        _check_weights(model, weights, path)
    if optimizer is not None:
        restore_optimizer(optimizer, read_tensors(path, OPTIMIZER_FILE, manifest), values.get("optimizer", {}))
    if model is not None and weights is not None:
        model.load_state_dict(weights)
    if restore_random:
        set_random_state(read_tensors(path, RANDOM_FILE, manifest), values.get("random", {}))
    return Checkpoint(path=path, config=manifest["config"], state=values.get("state", {}))


def has_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds a checkpoint, whole or not."""
    return find_folder(Path(folder)) is not None


def _manifest(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    path = find_folder(Path(folder))
    if path is None:
        raise CheckpointError(f"there is no checkpoint at {folder}. Check the path, or train a model first.")
    manifest = read_manifest(path)
    check_names(path, manifest, FILES)
    return path, manifest


def _read_state(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    if STATE_FILE not in manifest["files"]:
        return {}
    file = checked_file(path, STATE_FILE, manifest)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}). Restore the checkpoint.") from error
    return dict(values)


def read_tensors(path: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file that the manifest of the folder `path` lists, after its hash has been compared.

    Raises:
        CheckpointError: it is missing, changed, or no safetensors file.
    """
    safetensors = require("safetensors.torch", extra="train")
    file = checked_file(path, name, manifest)
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(str(file))
    # safetensors raises a class of its own, derived from Exception alone
    except Exception as error:
        raise CheckpointError(f"{file} is no safetensors file ({error}). Restore the checkpoint.") from error
    return tensors


def _check_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    missing, unknown = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not fit the model: missing {_some(missing)}; unknown {_some(unknown)}. "
            "Build the model from the checkpoint's own config (read_config)."
        )
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(weights[name].shape)} and the model {tuple(tensor.shape)}. "
                "Build the model from the checkpoint's own config (read_config)."
            )


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as safetensors; ones that share memory are written once each."""
    # safetensors refuses tensors that share memory (tied weights), so every one is written from its own copy
    own = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    data: bytes = require("safetensors.torch", extra="train").save(own)
    path.write_bytes(data)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _json(values: dict[str, Any], name: str) -> str:
    try:
        return json.dumps(values)
    except TypeError as error:
        raise CheckpointError(
            f"{name} holds what JSON cannot ({error}); use numbers, texts, lists and tables."
        ) from error
