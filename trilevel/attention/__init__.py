"""Multi-level attention: local, regional and global heads.

The names below are imported on first use: runtimes of artifacts need the native kernels, and no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilevel.attention.api import multi_level_attention
    from trilevel.attention.cache import DecodeCache
    from trilevel.attention.cost import Cost, Machine, attention_cost, measure_machine
    from trilevel.attention.layer import Explanation, MultiLevelAttention
    from trilevel.attention.levels import HeadSplit, LevelRatio, Levels

__all__ = [
    "Cost",
    "DecodeCache",
    "Explanation",
    "HeadSplit",
    "LevelRatio",
    "Levels",
    "Machine",
    "MultiLevelAttention",
    "attention_cost",
    "measure_machine",
    "multi_level_attention",
]

_HOMES = {
    "Cost": "cost",
    "DecodeCache": "cache",
    "Explanation": "layer",
    "HeadSplit": "levels",
    "LevelRatio": "levels",
    "Levels": "levels",
    "Machine": "cost",
    "MultiLevelAttention": "layer",
    "attention_cost": "cost",
    "measure_machine": "cost",
    "multi_level_attention": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trilevel.attention' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"trilevel.attention.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
