"""What a conversion changed, without the pretrained weights: classes of the heads, and the tensors that were trained.

Whoever has the source makes the converted encoder from it in a second or two, so that a model on top of a converted
encoder can be given away without the weights of others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilevel.attention.levels import Levels
from trilevel.conversion.assign import Classes, HeadClass
from trilevel.conversion.converted import REPORT_FILE, is_converted
from trilevel.conversion.multilevel import convertible, with_classes
from trilevel.conversion.settings import read_table
from trilevel.conversion.source import Source, load_source
from trilevel.errors import CheckpointError, ConfigError, ShapeError
from trilevel.model.checkpoint import read_tensors, write_tensors
from trilevel.model.config import EncoderConfig, layer_counts, layer_levels, uniform_heads
from trilevel.model.encoder import Encoder
from trilevel.model.folder import CONFIG_FILE, check_names, find_folder, read_manifest, write_folder

DELTA_FILE = "delta.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a folder of `save_delta` says beside its tensors.

    Attributes:
        folder: where it was read.
        source: name or folder of the pretrained encoder.
        sha256: of the source's weights.
        classes: (convertible blocks, heads), `HeadClass` values.
        config: of the converted encoder.
    """

    folder: Path
    source: str
    sha256: str
    classes: Classes
    config: EncoderConfig


def save_delta(folder: str | Path, source: Source, encoder: Encoder, classes: Classes) -> Path:
    """Write what differs between `source` and the encoder made of it; an older delta is replaced by a whole one only.

    Tensors that are equal bit by bit after `with_classes` are left out: with `--trained small` norms, biases, pooling
    and scorers remain.

    Args:
        folder: to write.
        source: the pretrained encoder, from `load_source`.
        encoder: the converted one.
        classes: of its heads, as `Conversion.classes` has them.

    Raises:
        ConfigError: the encoder is not what these classes make of this source.
        CheckpointError: something else is there, or the disk is full; what was there is unchanged.
    """
    where = Path(folder)
    if where.exists() and any(where.iterdir() if where.is_dir() else [where]) and not is_delta(where):
        raise CheckpointError(f"{where} exists and is no delta of an encoder; it is left alone. Choose another folder.")
    base = _base(source, encoder.config, classes)
    start, end = base.state_dict(), encoder.state_dict()
    changed = {name: end[name] for name in start if not torch.equal(start[name], end[name])}
    values = {
        "source": source.name,
        "sha256": source.sha256,
        "classes": [[HeadClass(own).name.lower() for own in block] for block in classes.tolist()],
        "encoder": encoder.config.to_dict(),
    }
    config = json.loads(json.dumps({"delta": values}))
    write_folder(where, {DELTA_FILE: partial(write_tensors, changed)}, config)
    return where


def save_delta_of(folder: str | Path, encoder: Source) -> Path:
    """As `save_delta`, of what `load_encoder` gave: a folder of `trilevel convert`, or a pretrained encoder as it is.

    The source of a converted encoder is loaded again by its name, and must have the weights it had.

    Raises:
        CheckpointError: the source is not there any more, or the report does not name the classes.
        ConfigError, MissingExtraError: as `save_delta` and `load_source` do.
    """
    if not is_converted(encoder.folder):
        blocks = len(convertible(encoder.encoder))
        classes = np.full((blocks, uniform_heads(encoder.encoder.config)), int(HeadClass.DENSE))
        return save_delta(folder, encoder, encoder.encoder, classes)
    source = load_source(encoder.name, sha256=encoder.sha256)
    report = encoder.folder / REPORT_FILE
    try:
        names = [[head["class"] for head in layer["heads"]] for layer in read_table(report)["layers"]]
        classes = _classes(names)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{report} does not say the classes of the heads ({error!r}). Convert again.") from error
    return save_delta(folder, source, encoder.encoder, classes)


def is_delta(folder: str | Path) -> bool:
    """Whether a folder was written by `save_delta`, whole or not."""
    found = find_folder(Path(folder))
    if found is None or not (found / CONFIG_FILE).is_file():
        return False
    try:
        return "delta" in read_manifest(found)["config"]
    except CheckpointError:
        return False


def read_delta(folder: str | Path) -> Delta:
    """What `save_delta` wrote, without its tensors.

    Raises:
        CheckpointError: nothing is there, or it is no delta.
    """
    path, manifest = _manifest(folder)
    where = path / CONFIG_FILE
    try:
        values = manifest["config"]["delta"]
        return Delta(
            folder=path,
            source=str(values["source"]),
            sha256=str(values["sha256"]),
            classes=_classes(values["classes"]),
            config=EncoderConfig.from_dict(values["encoder"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} describes no delta of an encoder ({error!r}). Copy it again.") from error


def apply_delta(folder: str | Path, source: Source) -> Encoder:
    """The converted encoder, in evaluation mode, from its source and what `save_delta` wrote.

    Raises:
        CheckpointError: the source has other weights than the delta was made from; a tensor is unknown, missing or of
            another shape; a file is not as it was written.
    """
    delta = read_delta(folder)
    if source.sha256 != delta.sha256:
        raise CheckpointError(
            f"{folder} was made from {delta.source} with weights of SHA-256 {delta.sha256[:12]}…, and {source.name} "
            f"has {source.sha256[:12]}…. Load the source that it names, or convert this one."
        )
    path, manifest = _manifest(folder)
    changed = read_tensors(path, DELTA_FILE, manifest)
    try:
        encoder = _base(source, delta.config, delta.classes)
    except (ConfigError, ShapeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit {source.name} ({error}). Copy it again.") from error
    wanted = encoder.state_dict()
    _check(path, changed, wanted)
    encoder.load_state_dict(wanted | changed)
    return encoder.eval()


def _base(source: Source, config: EncoderConfig, classes: Classes) -> Encoder:
    """The source under these classes, before anything is trained: pooling is the plain mean, scorers are zero."""
    dense, blocks = source.encoder, convertible(source.encoder)
    heads = uniform_heads(dense.config)
    if classes.shape != (len(blocks), heads):
        raise ConfigError(
            f"classes of shape {classes.shape} do not fit {source.name}, which has {len(blocks)} blocks to convert "
            f"with {heads} heads."
        )
    own = layer_levels(config.levels, config.num_layers)
    sizes = next((levels for index in blocks if (levels := own[index]) is not None), Levels())
    base = with_classes(dense, classes, sizes, [torch.zeros(dense.config.dim) for _ in blocks])
    if _written_out(base.config) != _written_out(config):
        raise ConfigError(f"the encoder's configuration is not what its classes make of {source.name}.")
    return base


def _written_out(config: EncoderConfig) -> EncoderConfig:
    """With an entry for each block, where one may stand for all."""
    return replace(
        config,
        levels=layer_levels(config.levels, config.num_layers),
        num_dense_heads=layer_counts(config.num_dense_heads, config.num_layers, "num_dense_heads"),
    )


def _check(path: Path, changed: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in changed.items():
        given, needed = _kind(tensor), _kind(wanted.get(name))
        if given != needed:
            raise CheckpointError(f"{path}: {name} is {given}, and the encoder has {needed}. Copy it again.")


def _kind(tensor: Tensor | None) -> str:
    return "nothing of that name" if tensor is None else f"{tuple(tensor.shape)}, {tensor.dtype}"


def _classes(names: Any) -> Classes:
    return np.array([[HeadClass[str(name).upper()] for name in block] for block in names], dtype=np.int64)


def _manifest(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    path = find_folder(Path(folder))
    if path is None:
        raise CheckpointError(f"there is no delta of an encoder at {folder}. Check the path.")
    manifest = read_manifest(path)
    check_names(path, manifest, {DELTA_FILE})
    return path, manifest
