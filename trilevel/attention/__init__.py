"""Multi-level attention: local, regional and global heads."""

from trilevel.attention.api import multi_level_attention
from trilevel.attention.cache import DecodeCache
from trilevel.attention.layer import Explanation, MultiLevelAttention
from trilevel.attention.levels import HeadSplit, LevelRatio, Levels

__all__ = [
    "DecodeCache",
    "Explanation",
    "HeadSplit",
    "LevelRatio",
    "Levels",
    "MultiLevelAttention",
    "multi_level_attention",
]
