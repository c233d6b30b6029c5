"""Where data lies, and what was made of it."""

from __future__ import annotations

import os
from pathlib import Path


def data_path(given: str | Path) -> Path:
    """A file or folder where it is said to be, else below the folder that TRILEVEL_DATA names."""
    path, root = Path(given), os.environ.get("TRILEVEL_DATA")
    if path.exists() or path.is_absolute() or not root or not (Path(root) / path).exists():
        return path
    return Path(root) / path


def cache_dir() -> Path:
    """Where made-again-able files lie: `TRILEVEL_CACHE`, else `~/.cache/trilevel`."""
    root = Path(os.environ.get("TRILEVEL_CACHE") or Path.home() / ".cache" / "trilevel")
    root.mkdir(parents=True, exist_ok=True)
    return root
