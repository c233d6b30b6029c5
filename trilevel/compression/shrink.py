"""A smaller encoder from what is kept of a larger one: sliced weights, and the configuration that they need."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import HeadSplit, LevelRatio, Levels
from trilevel.compression.importance import prunable_blocks
from trilevel.compression.keep import Kept, class_groups
from trilevel.errors import ConfigError
from trilevel.model.block import Block
from trilevel.model.config import EncoderConfig, block_sizes, layer_counts, layer_levels
from trilevel.model.encoder import Encoder
from trilevel.model.ffn import FeedForward
from trilevel.model.stack import BlockStack

Part = TypeVar("Part", bound=nn.Module)
Entry = TypeVar("Entry")


def prune_encoder(encoder: Encoder, kept: Kept) -> Encoder:
    """A smaller encoder: what `encoder` computes with the outputs of the other heads and channels set to zero.

    Its configuration builds it anew; type, device, training mode and what learns are those of `encoder`, which is left
    alone. Nothing that feeds a removed unit alone stays: rows of `in_proj`, `up`, `pool_weight` and `region_gate`,
    columns of `out_proj` and `down`. Where the ratio of a layer's levels would split the remaining heads otherwise, it
    becomes their counts.

    Raises:
        ConfigError: `kept` does not fit the encoder, or takes all heads of a class away.
    """
    twin = copy.deepcopy(encoder)
    twin.stack = prune_stack(encoder.stack, kept)
    twin.config = _config_of(encoder.config, list(prunable_blocks(twin).values()))
    return twin


def prune_stack(stack: BlockStack, kept: Kept) -> BlockStack:
    """As `prune_encoder`, of a stack of blocks."""
    blocks = prunable_blocks(stack)
    _check_kept(blocks, kept)
    twin = copy.deepcopy(stack)
    pairs = zip(blocks.values(), prunable_blocks(twin).values(), kept.groups, kept.channels, strict=True)
    for old, new, groups, channels in pairs:
        new.attention = _pruned_attention(old.attention, groups)
        new.ffn = _pruned_ffn(old.ffn, channels)
    return twin


def _pruned_attention(layer: MultiLevelAttention, groups: Sequence[int]) -> MultiLevelAttention:
    per_group = layer.num_heads // layer.num_kv_heads
    heads = [group * per_group + place for group in groups for place in range(per_group)]
    first_dense = layer.num_kv_heads - layer.num_dense_heads // per_group
    with_levels = [group for group in groups if group < first_dense]
    smaller = MultiLevelAttention(
        layer.embed_dim,
        len(heads),
        layer.head_dim,
        levels=None if layer.levels is None else _levels_of(layer, layer.levels, with_levels),
        num_kv_heads=len(groups),
        bias=layer.in_proj.bias is not None,
        rope_theta=layer.rope_theta,
        is_causal=layer.is_causal,
        num_dense_heads=per_group * (len(groups) - len(with_levels)),
        impl=layer.impl,
        device="meta",
    )
    state = layer.state_dict()
    keys = layer.num_heads
    values = keys + layer.num_kv_heads
    rows = [*heads, *(keys + group for group in groups), *(values + group for group in groups)]
    for name in ("in_proj.weight", "in_proj.bias"):
        if name in state:
            state[name] = state[name].unflatten(0, (-1, layer.head_dim))[rows].flatten(0, 1)
    state["out_proj.weight"] = state["out_proj.weight"].unflatten(1, (-1, layer.head_dim))[:, heads].flatten(1)
    if "pool_weight" in state:
        state["pool_weight"] = state["pool_weight"][with_levels]
    if "region_gate.weight" in state:
        regional = [head - layer.head_split.local for head in heads]
        own = [place for place in regional if 0 <= place < layer.head_split.regional]
        state["region_gate.weight"] = state["region_gate.weight"][own]
    return _filled(smaller, state, layer)


def _levels_of(layer: MultiLevelAttention, levels: Levels, groups: Sequence[int]) -> Levels:
    """The layer's levels, with a ratio that splits these groups into the classes they have."""
    classes = class_groups(layer)
    counts = [sum(group in classes.get(name, ()) for group in groups) for name in ("local", "regional", "global")]
    if levels.ratio.split(len(groups)) == HeadSplit(*counts):
        return levels
    return replace(levels, ratio=LevelRatio(*counts))


def _pruned_ffn(ffn: FeedForward, channels: Sequence[int]) -> FeedForward:
    own = list(channels)
    with torch.device("meta"):
        smaller = FeedForward(
            ffn.up.in_features,
            len(own),
            activation=ffn.activation,
            is_gated=ffn.is_gated,
            bias=ffn.up.bias is not None,
        )
    state = ffn.state_dict()
    rows = own + [ffn.down.in_features + channel for channel in own] if ffn.is_gated else own
    for name in ("up.weight", "up.bias"):
        if name in state:
            state[name] = state[name][rows]
    state["down.weight"] = state["down.weight"][:, own]
    return _filled(smaller, state, ffn)


def _filled(smaller: Part, state: dict[str, Tensor], like: nn.Module) -> Part:
    """The module, built without storage, with its own copy of these tensors; otherwise as `like`."""
    smaller.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    for name, parameter in smaller.named_parameters():
        parameter.requires_grad_(like.get_parameter(name).requires_grad)
    return smaller.train(like.training)


def _config_of(config: EncoderConfig, blocks: Sequence[Block]) -> EncoderConfig:
    """The configuration with the sizes of these blocks; a field that says the same already stays as it is."""
    layers = [block.attention for block in blocks]
    count = config.num_layers
    sizes = block_sizes(config.dim, config.num_heads, config.num_kv_heads, config.ffn_dim, count)
    heads = tuple(layer.num_heads for layer in layers)
    kv_heads = tuple(layer.num_kv_heads for layer in layers)
    widths = tuple(block.ffn.down.in_features for block in blocks)
    dense = tuple(layer.num_dense_heads for layer in layers)
    old_dense = layer_counts(config.num_dense_heads, count, "num_dense_heads")
    levels = tuple(layer.levels for layer in layers)
    # without a number of their own the key heads follow the heads
    is_follower = config.num_kv_heads is None
    old_heads, old_kv_heads, old_widths = (tuple(size[place] for size in sizes) for place in range(3))
    return replace(
        config,
        num_heads=config.num_heads if heads == old_heads else _shared(heads),
        num_kv_heads=config.num_kv_heads if is_follower or kv_heads == old_kv_heads else _shared(kv_heads),
        head_dim=config.head_dim if heads == old_heads else layers[0].head_dim,
        levels=config.levels if levels == layer_levels(config.levels, count) else _shared(levels),
        num_dense_heads=config.num_dense_heads if dense == old_dense else _shared(dense),
        ffn_dim=config.ffn_dim if widths == old_widths else _shared(widths),
    )


def _shared(values: tuple[Entry, ...]) -> Entry | tuple[Entry, ...]:
    """One value for all where they agree."""
    return values[0] if len(set(values)) == 1 else values


def _check_kept(blocks: dict[str, Block], kept: Kept) -> None:
    if not len(kept.groups) == len(kept.channels) == len(blocks):
        raise ConfigError(
            f"Kept has groups of {len(kept.groups)} and channels of {len(kept.channels)} blocks, and the model "
            f"{len(blocks)} blocks; give both for each."
        )
    for (name, block), groups, channels in zip(blocks.items(), kept.groups, kept.channels, strict=True):
        _check_ascending(f"{name}: groups", groups, block.attention.num_kv_heads)
        _check_ascending(f"{name}: channels", channels, block.ffn.down.in_features)
        for own, members in class_groups(block.attention).items():
            if not set(members) & set(groups):
                raise ConfigError(
                    f"{name}: groups={list(groups)} leave no {own} head of groups {members.start} to "
                    f"{members.stop - 1}; keep at least one of each class."
                )


def _check_ascending(what: str, kept: Sequence[int], size: int) -> None:
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise ConfigError(f"{what}={list(kept)[:9]} must be one or more ascending indices of 0 to {size - 1}.")
