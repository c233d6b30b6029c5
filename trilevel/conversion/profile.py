"""What each head of a dense encoder would lose as a local, regional or global head, measured on calibration text.

Two passes over the text, layer by layer, one sequence at a time: the first fits the scorer of the global tokens, the
second measures every head under every class on the dense model's own activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilevel.attention.api import multi_level_attention
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion.assign import Array
from trilevel.errors import ConfigError, InputError

ALONE = (LevelRatio(1, 0, 0), LevelRatio(0, 1, 0), LevelRatio(0, 0, 1))
"""All heads local, all regional, all global."""
MIN_SEQUENCES = 4
RIDGE = 1e-2
"""Of the scorer's regression, relative to the mean of the covariance's diagonal."""
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadProfile:
    """What calibration text says about the heads of a dense encoder.

    Args:
        error: (layers, heads, 3), as local, regional, global: the mean square of the change of the head's output, taken
            through its slice of the output projection, over the mean square of the stream it is added to.
        near, sink, far: (layers, heads), attention to near(i), to the first token when it is not near, and the rest;
            they add up to 1.
        entropy: (layers, heads), of the attention in nats.
        num_sequences, num_tokens: what it was measured on.
    """

    error: Array
    near: Array
    sink: Array
    far: Array
    entropy: Array
    num_sequences: int
    num_tokens: int


Forward = Callable[[Tensor], object]
"""Runs the encoder on the token ids (1, tokens) of one sequence."""


def fit_scorers(
    blocks: Sequence[nn.Module],
    forward: Forward,
    sequences: Sequence[Tensor],
    levels: Levels,
    *,
    heads: Sequence[Sequence[int]] | None = None,
    progress: Progress = lambda _what, _done: None,
) -> list[Tensor]:
    """For each layer the w of the scores w . x_j that foresee which tokens are looked at from afar.

    Ridge regression of the log of the attention that a token gets from queries outside its window, mean over the
    heads, on what the layer's attention reads; centred within each sequence, as only the order matters.

    Args:
        blocks: the encoder's blocks, each with `attention`, a `MultiLevelAttention` of dense attention.
        forward: runs the encoder.
        sequences: token ids, (tokens,) each.
        levels: whose window says what is near.
        heads: of each layer, that count; None is all.
        progress: told what is done.

    Returns:
        (dim,) a layer.

    Raises:
        InputError: too few sequences.
    """
    _check_sequences(sequences)
    width = _attention(blocks[0]).embed_dim
    covariance = [torch.zeros(width, width, dtype=torch.float64) for _ in blocks]
    product = [torch.zeros(width, dtype=torch.float64) for _ in blocks]

    def see(index: int, layer: MultiLevelAttention, x: Tensor, _stream: Tensor) -> None:
        tokens = x.shape[1]
        own = slice(None) if heads is None else list(heads[index])
        weights = _dense_weights(layer, x)[0][own]
        if not len(weights) or tokens < 2:
            return
        far = weights.masked_fill(_near(tokens, levels), 0).sum(1)
        received = (far.mean(0) + 1e-6).log().double()
        features = x[0].double()
        features = features - features.mean(0)
        covariance[index] += features.T @ features
        product[index] += features.T @ (received - received.mean())

    _watch(blocks, forward, sequences, see, "scoring tokens", progress)
    return [_ridge(square, right) for square, right in zip(covariance, product, strict=True)]


def profile_heads(
    blocks: Sequence[nn.Module],
    forward: Forward,
    sequences: Sequence[Tensor],
    levels: Levels,
    scorers: Sequence[Tensor],
    *,
    progress: Progress = lambda _what, _done: None,
) -> HeadProfile:
    """Measure every head under every class; arguments as in `fit_scorers`, which gives the scorers.

    Raises:
        InputError: too few sequences.
        ConfigError: the blocks differ in their heads.
    """
    _check_sequences(sequences)
    layers, heads = len(blocks), _num_heads(blocks)
    error, stream = torch.zeros(layers, heads, 3, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
    mass = torch.zeros(layers, heads, 3, dtype=torch.float64)
    entropy = torch.zeros(layers, heads, dtype=torch.float64)
    num_tokens = 0

    def see(index: int, layer: MultiLevelAttention, x: Tensor, added_to: Tensor) -> None:
        nonlocal num_tokens
        num_tokens += x.shape[1] if index == 0 else 0
        weights, value = _dense_weights(layer, x)
        dense = weights @ value.repeat_interleave(layer.num_heads // layer.num_kv_heads, 0)
        score = (x @ scorers[index].to(x.dtype)).float()
        for place, ratio in enumerate(ALONE):
            changed = _one_class(layer, x, replace(levels, ratio=ratio, dense_below=None), score) - dense
            error[index, :, place] += _through_projection(layer, changed)
        stream[index] += added_to.double().square().sum()
        near = _near(x.shape[1], levels)
        mass[index, :, 0] += weights.masked_fill(~near, 0).sum((1, 2))
        mass[index, :, 1] += weights[:, :, 0].masked_fill(near[:, 0], 0).sum(1)
        entropy[index] += torch.special.entr(weights).sum((1, 2))

    _watch(blocks, forward, sequences, see, "profiling heads", progress)
    near, sink = (mass[..., place].numpy() / num_tokens for place in (0, 1))
    return HeadProfile(
        error=(error / stream[:, None, None]).numpy(),
        near=near,
        sink=sink,
        far=np.maximum(0.0, 1 - near - sink),
        entropy=entropy.numpy() / num_tokens,
        num_sequences=len(sequences),
        num_tokens=num_tokens,
    )


See = Callable[[int, MultiLevelAttention, Tensor, Tensor], None]
"""Gets a layer's index and attention, what it reads (1, tokens, dim), and the stream that its output is added to."""


@torch.no_grad()
def _watch(
    blocks: Sequence[nn.Module],
    forward: Forward,
    sequences: Sequence[Tensor],
    see: See,
    what: str,
    progress: Progress,
) -> None:
    with _hooked(blocks, see):
        for done, sequence in enumerate(sequences):
            progress(what, done / len(sequences))
            forward(sequence[None])
    progress(what, 1.0)


@contextmanager
def _hooked(blocks: Sequence[nn.Module], see: See) -> Iterator[None]:
    streams: dict[int, Tensor] = {}

    def of_block(index: int) -> Callable[..., None]:
        def keep(_module: nn.Module, given: tuple[Any, ...]) -> None:
            streams[index] = given[0]

        return keep

    def of_attention(index: int) -> Callable[..., None]:
        def look(module: nn.Module, given: tuple[Any, ...]) -> None:
            assert isinstance(module, MultiLevelAttention)
            see(index, module, given[0], streams.pop(index))

        return look

    handles = []
    try:
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(of_block(index)))
            handles.append(_attention(block).register_forward_pre_hook(of_attention(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention(block: nn.Module) -> MultiLevelAttention:
    attention = block.attention
    assert isinstance(attention, MultiLevelAttention)
    return attention


def _num_heads(blocks: Sequence[nn.Module]) -> int:
    counts = [_attention(block).num_heads for block in blocks]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"the blocks have {counts} heads and as many in each are needed; convert before pruning, and prune last."
        )
    return counts[0]


def _dense_weights(layer: MultiLevelAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (heads, tokens, tokens) and values (kv_heads, tokens, head_dim) of one sequence without padding."""
    query, key, value = layer.project(x)
    key = key.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)
    weights = (query @ key.transpose(-1, -2) * layer.head_dim**-0.5).softmax(-1)
    return weights[0], value[0]


def _one_class(layer: MultiLevelAttention, x: Tensor, levels: Levels, score: Tensor) -> Tensor:
    query, key, value = layer.project(x)
    given = score if levels.ratio.global_ else None
    out = multi_level_attention(query, key, value, levels=levels, global_score=given)
    assert isinstance(out, Tensor)
    return out[0]


def _through_projection(layer: MultiLevelAttention, changed: Tensor) -> Tensor:
    """Sum of squares of each head's (heads, tokens, head_dim) after its slice of the output projection: (heads,)."""
    slices = layer.out_proj.weight.unflatten(1, (layer.num_heads, layer.head_dim)).transpose(0, 1)
    square = slices.transpose(1, 2) @ slices
    total: Tensor = ((changed @ square) * changed).sum((1, 2))
    return total.double()


def _near(tokens: int, levels: Levels) -> Tensor:
    at = torch.arange(tokens)
    near: Tensor = (at[:, None] - at).abs() <= levels.radius
    return near


def _ridge(square: Tensor, right: Tensor) -> Tensor:
    scale = square.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    found: Tensor = torch.linalg.solve(square + RIDGE * scale * torch.eye(len(square), dtype=square.dtype), right)
    return found.float()


def _check_sequences(sequences: Sequence[Tensor]) -> None:
    if len(sequences) < MIN_SEQUENCES:
        raise InputError(
            f"the calibration text gives {len(sequences)} sequences; at least {MIN_SEQUENCES} are needed, and 32 to "
            "128 are good. Give more or longer text."
        )
