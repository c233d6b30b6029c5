"""Where data lies."""

from __future__ import annotations

import os
from pathlib import Path


def data_path(given: str | Path) -> Path:
    """A file or folder where it is said to be, else below the folder that TRILEVEL_DATA names."""
    path, root = Path(given), os.environ.get("TRILEVEL_DATA")
    if path.exists() or path.is_absolute() or not root or not (Path(root) / path).exists():
        return path
    return Path(root) / path
