"""Multi-level attention for long inputs: local, regional and global heads in a ratio that the task sets.

The names below are imported on first use, so `import trilevel` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilevel.applications.artifacts import load
    from trilevel.attention.api import multi_level_attention
    from trilevel.attention.layer import MultiLevelAttention
    from trilevel.attention.levels import LevelRatio, Levels

__version__ = "0.4.0"
__all__ = ["LevelRatio", "Levels", "MultiLevelAttention", "__version__", "load", "multi_level_attention"]

_HOMES = {
    "LevelRatio": "trilevel.attention.levels",
    "Levels": "trilevel.attention.levels",
    "MultiLevelAttention": "trilevel.attention.layer",
    "load": "trilevel.applications.artifacts",
    "multi_level_attention": "trilevel.attention.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trilevel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
