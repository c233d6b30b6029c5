"""A dense encoder and the classes of its heads to an encoder whose heads are local, regional, global or dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion.assign import Classes, HeadClass
from trilevel.model.config import layer_levels
from trilevel.model.encoder import Encoder, with_levels


def convertible(encoder: Encoder) -> list[int]:
    """Indices of the blocks with dense attention; the others have levels already (ModernBERT's sliding ones)."""
    levels = layer_levels(encoder.config.levels, encoder.config.num_layers)
    return [index for index, own in enumerate(levels) if own is None]


def with_classes(encoder: Encoder, classes: Classes, levels: Levels, scorers: Sequence[Tensor]) -> Encoder:
    """A new encoder with the same weights, its heads in the order local, regional, global, dense in each block.

    Pooling starts as the plain mean, the scorers as given; heads move together with their slices of the projections.

    Args:
        encoder: with dense attention in the blocks that `convertible` names.
        classes: (convertible blocks, heads), `HeadClass` values.
        levels: sizes of the levels; the ratio follows from the classes, block by block.
        scorers: w of the global tokens' scores, (dim,) for each convertible block.
    """
    config = encoder.config
    all_levels = list(layer_levels(config.levels, config.num_layers))
    dense = [0] * config.num_layers
    blocks = convertible(encoder)
    for index, own in zip(blocks, classes, strict=True):
        counts = np.bincount(own, minlength=4).tolist()
        if sum(counts[:3]):
            all_levels[index] = replace(levels, ratio=LevelRatio(*counts[:3]))
            dense[index] = counts[HeadClass.DENSE]
    converted = with_levels(encoder, tuple(all_levels), num_dense_heads=tuple(dense))
    for index, own, scorer in zip(blocks, classes, scorers, strict=True):
        attention = converted.stack.blocks[index].attention
        assert isinstance(attention, MultiLevelAttention)
        _reorder(attention, np.argsort(own, kind="stable").tolist())
        if hasattr(attention, "scorer"):
            with torch.no_grad():
                attention.scorer.weight.copy_(scorer[None])
    return converted


@torch.no_grad()
def _reorder(attention: MultiLevelAttention, order: list[int]) -> None:
    """Put head order[i] in place i; the layer's function does not change but for what the heads see."""
    heads, dim = attention.num_heads, attention.head_dim
    if attention.num_kv_heads != heads:
        raise AssertionError("grouped heads move in whole groups; no supported family has them")
    for parameter in attention.in_proj.parameters():
        parameter.copy_(parameter.unflatten(0, (3, heads, dim))[:, order].flatten(0, 2))
    weight = attention.out_proj.weight
    weight.copy_(weight.unflatten(1, (heads, dim))[:, order].flatten(1, 2))
