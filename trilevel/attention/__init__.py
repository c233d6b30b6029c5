"""Multi-level attention: local, regional and global heads."""

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
