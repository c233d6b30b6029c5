"""The folder of a run: `checkpoint/` (weights, configuration, classes) and `log.csv`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilevel.applications.images.model import ImageClassifier, ImageClassifierConfig
from trilevel.compression.checkpoint import load_compressed
from trilevel.errors import CheckpointError, ConfigError
from trilevel.model.checkpoint import has_checkpoint, read_config, save_checkpoint
from trilevel.model.config import from_mapping

CHECKPOINT_FOLDER = "checkpoint"
KIND = "image_classifier"
"""The key in a checkpoint's configuration that tells these runs from others."""
_AGAIN = "Name a folder that `trilevel train images` wrote."
# where things lie does not change what is learned from them
_FREE = ("path", "teacher")
_NAMED = {"sha256": "data", "teacher_sha256": "teacher weights"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a model was trained on.

    Attributes:
        path: of the data.
        sha256: of the images and their classes.
        size: that they were resized to; None for none.
        valid_fraction, limit: how they were split.
        teacher: folder of the run that was learned from; None for none.
        teacher_sha256: of its weights.
    """

    path: str
    sha256: str
    size: tuple[int, int] | None
    valid_fraction: float
    limit: int | None
    teacher: str | None = None
    teacher_sha256: str | None = None

    def __post_init__(self) -> None:
        """JSON knows lists only."""
        if self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A trained classifier: the model in evaluation mode, its origin, steps done and steps planned."""

    folder: Path
    model: ImageClassifier
    origin: Origin
    step: int
    steps: int

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the order of the logits."""
        return self.model.config.labels


def saved_config(model: ImageClassifier, origin: Origin) -> dict[str, Any]:
    """What the checkpoint keeps beside the weights."""
    values = {field.name: getattr(origin, field.name) for field in dataclasses.fields(origin)}
    values["size"] = None if origin.size is None else list(origin.size)
    return {KIND: model.config.to_dict(), "origin": values}


def prepare_run(folder: Path, config: Mapping[str, Any]) -> None:
    """See that the folder is free, or that the run in it is the same one, to go on with.

    Raises:
        ConfigError: a run with other data or other sizes is there.
        CheckpointError: the folder cannot be written, or what is there is damaged.
    """
    checkpoint = folder / CHECKPOINT_FOLDER
    if has_checkpoint(checkpoint):
        there = _flat(read_config(checkpoint))
        changed = [name for name, value in _flat(config).items() if name not in _FREE and there.get(name) != value]
        if changed:
            raise ConfigError(
                f"{checkpoint} is of another run; different are: {', '.join(changed)}. Give the same data and options "
                "to go on, or choose another --out."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}). Choose another --out.") from error


def save_run(run: Run) -> None:
    """Write a run to its folder, without the state of its training."""
    state = {"step": run.step, "course": {"steps": run.steps}}
    save_checkpoint(
        run.folder / CHECKPOINT_FOLDER, model=run.model, config=saved_config(run.model, run.origin), state=state
    )


def load_run(path: str | Path) -> Run:
    """Read a run.

    Raises:
        CheckpointError: a file is missing, has a wrong hash or shape, or is of another kind of run.
        MissingExtraError: safetensors is not installed.
    """
    folder = Path(path)
    checkpoint = folder / CHECKPOINT_FOLDER
    if not has_checkpoint(checkpoint):
        raise CheckpointError(f"there is no trained image classifier at {folder}. {_AGAIN}")
    config = read_config(checkpoint)
    if not isinstance(config.get(KIND), Mapping) or not isinstance(config.get("origin"), Mapping):
        raise CheckpointError(f"{checkpoint} holds no image classifier. {_AGAIN}")
    try:
        model = ImageClassifier(ImageClassifierConfig.from_dict(config[KIND]))
        origin = from_mapping(Origin, config["origin"])
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: its configuration is not understood: {error}") from error
    model, loaded = load_compressed(checkpoint, model)
    state = loaded.state
    step = int(state.get("step", 0))
    steps = int(state.get("course", {}).get("steps", step))
    return Run(folder=folder, model=model.eval(), origin=origin, step=step, steps=steps)


def is_image_run(folder: str | Path) -> bool:
    """Whether a folder holds a run of this kind, by the configuration of its checkpoint."""
    checkpoint = Path(folder) / CHECKPOINT_FOLDER
    return has_checkpoint(checkpoint) and KIND in read_config(checkpoint)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that decide whether two runs are one, by the names that a message may use."""
    model, origin = (dict(config.get(name) or {}) for name in (KIND, "origin"))
    encoder = dict(model.pop("encoder", {}))
    return encoder | model | {_NAMED.get(name, name): value for name, value in origin.items()}
