"""Which part of the input each level looks at: recorded attention inputs, global tokens, attention by position.

The share of attention that falls on a part of the input is the output of the attention itself when a token's value is 1
inside that part and 0 outside. So the picture is made by the function that it explains, summaries and remainders
included (a summary's share is spread over its tokens), in O(tokens) memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilevel.attention.api import multi_level_attention
from trilevel.attention.layer import Explanation, MultiLevelAttention
from trilevel.attention.levels import Levels
from trilevel.report.content import HeadClass, LevelMap

NUM_QUERIES = 64
NUM_BINS = 128
CLASSES: tuple[HeadClass, ...] = ("local", "regional", "global")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One call of a layer: its input (batch, tokens, dim) and keyword arguments."""

    layer: MultiLevelAttention
    x: Tensor
    arguments: dict[str, Any]


@contextmanager
def record_layers(model: nn.Module) -> Iterator[list[Recorded]]:
    """Record the calls of every layer with levels inside `model`, in the order they run.

    Keeps each input, (batch, tokens, dim), alive as long as the list.
    """
    found: list[Recorded] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        assert isinstance(layer, MultiLevelAttention)
        rest = {name: value for name, value in arguments.items() if name not in ("x", "explain")}
        found.append(Recorded(layer=layer, x=args[0] if args else arguments["x"], arguments=rest))

    layers = [m for m in model.modules() if isinstance(m, MultiLevelAttention) and m.levels is not None]
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def explain(recorded: Recorded) -> Explanation:
    """Which tokens were global in a recorded call, and why."""
    explanation: Explanation = recorded.layer(recorded.x, **recorded.arguments, explain=True)[1]
    return explanation


@torch.inference_mode()
def level_maps(
    recorded: Recorded,
    *,
    layer: str,
    element: str = "token",
    num_queries: int = NUM_QUERIES,
    num_bins: int = NUM_BINS,
) -> list[LevelMap]:
    """One map for each head class with levels of a recorded call; sequence 0 of the batch, which must hold no padding.

    Args:
        recorded: the call.
        layer: name shown to the reader.
        element: what the layer attends over, e.g. `sentence`.
        num_queries: rows, at most the number of tokens.
        num_bins: equal parts of the input, at most the number of tokens.
    """
    levels = recorded.layer.levels
    assert levels is not None
    tokens = recorded.x.shape[1]
    bins = min(num_bins, tokens)
    rows = torch.linspace(0, tokens - 1, min(num_queries, tokens)).round().long()
    mass = torch.cat([part[0, :, rows] for part in _attended(recorded, levels, _indicators(tokens, bins))], -1)
    maps: list[LevelMap] = []
    start = 0
    for name, count in zip(CLASSES, recorded.layer.head_split, strict=True):
        if count:
            shown: np.ndarray = mass[start : start + count].mean(0)[:, :bins].double().numpy()
            sees = _sees(name, levels, tokens, f"{element}s")
            maps.append(LevelMap(layer=layer, element=element, head_class=name, num_heads=count, sees=sees, mass=shown))
        start += count
    return maps


def _indicators(tokens: int, bins: int) -> Tensor:
    """(tokens, bins): 1 where the token is in the bin."""
    of_token = torch.arange(tokens) * bins // tokens
    return nn.functional.one_hot(of_token, bins).float()


def _attended(recorded: Recorded, levels: Levels, values: Tensor) -> Iterator[Tensor]:
    """The attention's output for `values` (tokens, bins), some bins at a time: (batch, heads, tokens, head dim)."""
    layer, known = recorded.layer, recorded.arguments
    x = recorded.x[:1]
    q, k, _ = layer.project(x, _first(known.get("positions")))
    if layer.num_dense_heads:
        q, k = (layer.without_dense(part)[0] for part in (q, k))
    has_global = levels.ratio.global_ > 0
    for part in values.to(x.dtype).split(layer.head_dim, 1):
        padded = nn.functional.pad(part, (0, layer.head_dim - part.shape[1]))
        yield multi_level_attention(
            q,
            k,
            padded.expand_as(k),
            levels=levels,
            pool_weight=layer.pool_weight,
            global_score=layer.scorer(x).squeeze(-1) if has_global else None,
            global_prior=_first(known.get("global_prior")) if has_global else None,
            global_forced=_first(known.get("global_forced")) if has_global else None,
            padding_mask=_first(known.get("padding_mask")),
            segment_ids=_first(known.get("segment_ids")),
            num_segments=known.get("num_segments"),
            is_causal=layer.is_causal,
            impl=layer.impl,
        )


def _first(given: Tensor | None) -> Tensor | None:
    """Sequence 0 of the batch."""
    return given[:1] if given is not None and given.ndim > 1 else given


def _sees(name: HeadClass, levels: Levels, tokens: int, elements: str) -> str:
    near = f"window of {levels.window} {elements}"
    size = levels.region_size
    regions = f"{levels.num_regions if size is None else -(-tokens // size)} region summaries"
    if name == "regional":
        return f"{near}, {regions}"
    if name == "local":
        return f"{near}, mean of the rest"
    rest = regions if levels.union else "mean of the rest"
    return f"{near}, {min(levels.num_global_tokens, tokens)} global {elements}, {rest}"


def spread(recorded: Sequence[Recorded], count: int) -> list[int]:
    """At most `count` indices from first to last."""
    if len(recorded) <= count:
        return list(range(len(recorded)))
    return sorted({round(i * (len(recorded) - 1) / max(1, count - 1)) for i in range(count)})
