"""Which application a folder with a trained model belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from trilevel.conversion.converted import is_converted
from trilevel.errors import CheckpointError
from trilevel.model.checkpoint import has_checkpoint, read_config

Kind = Literal["images", "classification", "documents", "embedding"]
CHECKPOINT_FOLDER = "checkpoint"
# a key that the configuration of no other application has
_KEYS: dict[str, Kind] = {
    "image_classifier": "images",
    "classifier": "classification",
    "tokens": "documents",
    "backbone": "documents",
}


def kind_of(folder: str | Path) -> Kind:
    """The application whose training, conversion or compression wrote `folder`.

    Raises:
        CheckpointError: there is no such folder, or no application knows what is in it.
    """
    where = Path(folder)
    if is_converted(where):
        return "embedding"
    checkpoint = where / CHECKPOINT_FOLDER
    if has_checkpoint(checkpoint):
        config = read_config(checkpoint)
        for key, kind in _KEYS.items():
            if key in config:
                return kind
    raise CheckpointError(
        f"{where} holds no model of trilevel's. Name a folder that `trilevel train`, `convert` or `compress` wrote."
    )


def model_kind(name_or_path: str | Path) -> Kind:
    """As `kind_of`; what is no folder of trilevel's is a pretrained encoder, by its name or folder."""
    folder = Path(name_or_path)
    # what is no folder may be the name of a pretrained encoder, and one of those has its config.json
    if not folder.exists() or ((folder / "config.json").is_file() and not (folder / CHECKPOINT_FOLDER).exists()):
        return "embedding"
    return kind_of(folder)
