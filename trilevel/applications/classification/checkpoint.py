"""The folder of a run: `checkpoint/` (weights, configuration, classes), `tokenizer.json`, `log.csv`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilevel.applications.classification.data import Columns
from trilevel.applications.classification.model import Classifier, ClassifierConfig
from trilevel.compression.checkpoint import load_compressed
from trilevel.conversion.source import Source
from trilevel.errors import CheckpointError, ConfigError, require
from trilevel.model.checkpoint import has_checkpoint, read_config
from trilevel.model.config import from_mapping

CHECKPOINT_FOLDER, TOKENIZER_FILE = "checkpoint", "tokenizer.json"
_AGAIN = "Name a folder that `trilevel train classification` wrote."
# where the file lies does not change what is learned from it
_FREE = ("path",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a model was trained on.

    Attributes:
        encoder: name or folder that was given.
        encoder_sha256: of its weights, before any conversion.
        path: of the data.
        sha256: of that file.
        columns: of the table.
        valid_fraction, limit: how it was split.
    """

    encoder: str
    encoder_sha256: str
    path: str
    sha256: str
    columns: Columns
    valid_fraction: float
    limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A trained classifier: the model in evaluation mode, its tokenizer, its origin, steps done and steps planned."""

    folder: Path
    model: Classifier
    tokenizer: Any
    origin: Origin
    step: int
    steps: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the logits."""
        return self.model.config.labels

    @property
    def max_tokens(self) -> int:
        """Tokens of a text that are read."""
        return self.model.config.max_tokens


def saved_config(model: Classifier, tokenizer_text: str, origin: Origin, batching: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint keeps beside the weights; `batching` is how rows become batches."""
    return {
        "classifier": model.config.to_dict(),
        "tokenizer_sha256": hashlib.sha256(tokenizer_text.encode()).hexdigest(),
        "origin": _to_dict(origin),
        "batching": dict(batching),
    }


def prepare_run(folder: Path, source: Source, config: Mapping[str, Any]) -> None:
    """Make the folder with its tokenizer, or see that the run in it is the same one, to go on with.

    Raises:
        ConfigError: a run with another encoder, other data or other sizes is there.
        CheckpointError: the folder cannot be written, or what is there is damaged.
    """
    checkpoint = folder / CHECKPOINT_FOLDER
    if has_checkpoint(checkpoint):
        there = _flat(read_config(checkpoint))
        # what an older trilevel did not write is not compared
        changed = [
            name for name, value in _flat(config).items() if name not in _FREE and there.get(name, value) != value
        ]
        if changed:
            raise ConfigError(
                f"{checkpoint} is of another run; different are: {', '.join(changed)}. Give the same encoder, data and "
                "options to go on, or choose another --out."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{TOKENIZER_FILE}.tmp"
        partial.write_text(source.tokenizer.to_str(), encoding="utf-8")
        partial.replace(folder / TOKENIZER_FILE)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}). Choose another --out.") from error


def load_run(path: str | Path) -> Run:
    """Read a run; the encoder it was made from is not needed.

    Raises:
        CheckpointError: a file is missing, has a wrong hash or shape, or is of another kind of run.
        MissingExtraError: tokenizers or safetensors is not installed.
    """
    folder = Path(path)
    checkpoint = folder / CHECKPOINT_FOLDER
    if not has_checkpoint(checkpoint):
        raise CheckpointError(f"there is no trained classifier at {folder}. {_AGAIN}")
    config = read_config(checkpoint)
    if not isinstance(config.get("classifier"), Mapping) or not isinstance(config.get("origin"), Mapping):
        raise CheckpointError(f"{checkpoint} holds no classifier. {_AGAIN}")
    try:
        model = Classifier(ClassifierConfig.from_dict(config["classifier"]))
        origin = _from_dict(config["origin"])
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: its configuration is not understood: {error}") from error
    tokenizer = _read_tokenizer(folder / TOKENIZER_FILE, str(config.get("tokenizer_sha256")))
    model, loaded = load_compressed(checkpoint, model)
    state = loaded.state
    step = int(state.get("step", 0))
    steps = int(state.get("course", {}).get("steps", step))
    return Run(folder=folder, model=model.eval(), tokenizer=tokenizer, origin=origin, step=step, steps=steps)


def _read_tokenizer(path: Path, sha256: str) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Copy the whole folder of the run.") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} is not the tokenizer that the model was trained with. Restore the run.")
    return require("tokenizers", extra="convert").Tokenizer.from_str(data.decode())


def _to_dict(origin: Origin) -> dict[str, Any]:
    values = {name: getattr(origin, name) for name in Origin.__dataclass_fields__}
    return values | {"columns": {name: getattr(origin.columns, name) for name in Columns.__dataclass_fields__}}


def _from_dict(values: Mapping[str, Any]) -> Origin:
    return from_mapping(Origin, dict(values) | {"columns": from_mapping(Columns, values.get("columns"))})


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that decide whether two runs are one, by the names that a message may use."""
    parts = {name: dict(config.get(name) or {}) for name in ("classifier", "origin", "batching")}
    columns = {f"{name} column": value for name, value in dict(parts["origin"].pop("columns", {})).items()}
    named = {"sha256": "data", "encoder": "encoder name", "encoder_sha256": "encoder weights"}
    origin = {named.get(name, name): value for name, value in parts["origin"].items() if name != "encoder"}
    tokenizer = {"tokenizer": config.get("tokenizer_sha256")}
    return parts["classifier"] | origin | columns | parts["batching"] | tokenizer
