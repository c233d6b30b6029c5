"""Pretrained weights: read from safetensors alone, and handed to our parameters by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trilevel.conversion.families import HEADS, Family, Plan
from trilevel.conversion.settings import read_table
from trilevel.errors import CheckpointError, ConfigError, require
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# formats that run code when they are read, or that need another framework
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_SOME = 3


def find_weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model, one or its shards in the order of their names.

    Raises:
        CheckpointError: there are none, a shard is missing, or the weights are pickled.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return (folder / WEIGHTS_FILE,)
    if (folder / INDEX_FILE).is_file():
        return _shards(folder)
    others = sorted(path.name for pattern in OTHER_FORMATS for path in folder.glob(pattern))
    if others:
        raise CheckpointError(
            f"{folder} has its weights in {', '.join(others[:_SOME])} and no {WEIGHTS_FILE}. Pickled weights can run "
            'code when they are read and are refused. Where you trust them, convert them once: python -c "from '
            f"transformers import AutoModel; AutoModel.from_pretrained('{folder}').save_pretrained('OUT')\"; then copy "
            "the tokenizer's files to OUT."
        )
    raise CheckpointError(f"{folder} has no {WEIGHTS_FILE} or {INDEX_FILE}. Download the model again.")


def _shards(folder: Path) -> tuple[Path, ...]:
    names = read_table(folder / INDEX_FILE).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map. Download the model again.")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX_FILE} names {name!r}, which is outside the folder; it is not read.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its index names. Download the model again.")
    return tuple(folder / name for name in files)


def hash_weights(files: tuple[Path, ...]) -> str:
    """SHA-256 of the weights in hexadecimal.

    One file: that of the file. Shards: what `sha256sum model-*.safetensors | sha256sum` prints, the files named
    without a folder, in order.
    """
    digests = [_hash_file(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_weights(files: tuple[Path, ...]) -> dict[str, Tensor]:
    """All tensors of the files by name.

    Raises:
        CheckpointError: a file is damaged, or a name stands in two.
        MissingExtraError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", extra="convert")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found: dict[str, Tensor] = safetensors.load_file(str(file))
        # safetensors raises a class of its own, derived from Exception alone
        except Exception as error:
            raise CheckpointError(f"{file} is no safetensors file ({error}). Download the model again.") from error
        twice = sorted(set(tensors) & set(found))
        if twice:
            raise CheckpointError(f"{file} has {_some(twice)}, as another shard has. Download the model again.")
        tensors |= found
    return tensors


def bare_encoder(config: EncoderConfig) -> Encoder:
    """An encoder whose parameters take no memory and hold nothing, to be replaced.

    Raises:
        ConfigError: a size that no tensor can have.
    """
    try:
        with torch.device("meta"):
            return Encoder(config)
    # torch's words for a number of bytes, or one size, beyond 64 bits
    except (RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"config.json asks for sizes that no model has ({reason}). Download the model again."
        ) from error


def map_weights(
    tensors: Mapping[str, Tensor], family: Family, plan: Plan, wanted: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Our parameters from a source's, float32, and the names of the source's that no parameter needs.

    Args:
        tensors: the source's, by its names.
        family: what the source is.
        plan: which of them make which parameter.
        wanted: shapes of our parameters.

    Raises:
        CheckpointError: a weight is missing, unknown, or has another shape or kind than the configuration says.
    """
    given: dict[str, str] = {}
    for name in tensors:
        other = given.setdefault(_own_name(name, family), name)
        if other != name:
            raise CheckpointError(f"the weights hold {other} and {name}, which are one. Download the model again.")
    pieces = {target: _sources(target, plan) for target in wanted}
    absent = {
        target for target in wanted if target.endswith(".bias") and target.removesuffix(".bias") in plan.without_bias
    }
    needed = {name for target, names in pieces.items() if target not in absent for name in names}
    _check_names(given, needed, family)
    state = {
        target: torch.zeros(wanted[target])
        if target in absent
        else _stacked(target, {name: tensors[given[name]] for name in names}, plan, wanted[target])
        for target, names in pieces.items()
    }
    return state, tuple(sorted(given[name] for name in given.keys() - needed))


def _own_name(name: str, family: Family) -> str:
    """A name without the model's prefix; norms of the first BERTs say gamma and beta."""
    name = name.removeprefix(family.prefix)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _sources(target: str, plan: Plan) -> tuple[str, ...]:
    module, _, leaf = target.rpartition(".")
    return tuple(source.replace("*", leaf) for source in plan.modules[module])


def _check_names(given: Mapping[str, str], needed: set[str], family: Family) -> None:
    missing = sorted(needed - given.keys())
    if missing:
        raise CheckpointError(
            f"the weights lack {_some(missing)}, which a {family.name} of this config.json has. Download the model "
            "again, or check that config.json belongs to it."
        )
    known = HEADS + family.leftovers
    unknown = sorted(given[name] for name in given.keys() - needed if not name.startswith(known))
    if unknown:
        raise CheckpointError(
            f"the weights hold {_some(unknown)}, which is no part of a {family.name} of this config.json; the encoder "
            "would differ from the model. Check that config.json belongs to it."
        )


def _stacked(target: str, parts: Mapping[str, Tensor], plan: Plan, wanted: torch.Size) -> Tensor:
    first = plan.first_rows.get(target.rpartition(".")[0], 0)
    shape = (wanted[0] // len(parts) + first, *wanted[1:])
    found = []
    for name, tensor in parts.items():
        # the learned tokens and positions of images carry a batch axis
        bare = tensor[0] if tensor.ndim == len(shape) + 1 and len(tensor) == 1 else tensor
        if tuple(bare.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}; config.json says {shape}. Check that it belongs to the "
                "weights."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} has type {tensor.dtype}; only floating-point weights are supported.")
        if not bare.isfinite().all():
            raise CheckpointError(f"{name} holds values that are no finite numbers. Download the model again.")
        found.append(bare[first:].float())
    # a copy even of one: what was read may still lie in the file
    return torch.cat(found)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SOME} more" if len(names) > _SOME else ""
    return ", ".join(names[:_SOME]) + more
