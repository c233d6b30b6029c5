"""Which groups of heads and which feed-forward channels stay, from their importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import largest_remainder
from trilevel.compression.importance import Importance
from trilevel.errors import ConfigError
from trilevel.model.block import Block

Scope = Literal["global", "layer"]
HeadClass = Literal["local", "regional", "global", "dense"]
CLASSES: tuple[HeadClass, ...] = ("local", "regional", "global", "dense")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What stays of a stack of blocks.

    Attributes:
        groups: for each block its KV groups that stay with their query heads (heads, where none are grouped),
            ascending, one at least of every class of heads.
        channels: for each block its feed-forward channels that stay, ascending, at least one.
    """

    groups: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...]


def class_groups(layer: MultiLevelAttention) -> dict[HeadClass, range]:
    """The KV groups of each class of heads that the layer has, in their order."""
    per_group = layer.num_heads // layer.num_kv_heads
    counts = [heads // per_group for heads in layer.head_split]
    counts.append(layer.num_kv_heads - sum(counts))
    ends = [sum(counts[: place + 1]) for place in range(4)]
    ranges = {name: range(end - count, end) for name, end, count in zip(CLASSES, ends, counts, strict=True)}
    return {name: own for name, own in ranges.items() if own}


def choose(
    blocks: Sequence[Block],
    importance: Importance,
    *,
    keep_heads: float,
    keep_ffn: float,
    scope: Scope,
    multiple: int,
) -> Kept:
    """Keep the most important units.

    How many groups a block keeps is `keep_heads` of its own with `scope="layer"`; with `"global"` the blocks compete
    for `keep_heads` of all groups, by their scores divided by the root mean square of those of their block (Michel et
    al. 2019 divide by the Euclidean norm). These are shared out among the classes of the block's heads in proportion to
    what it had (largest remainder, one at least of each class), and in each class the most important ones stay.
    Channels likewise, in steps of `multiple`, one step at least in each block: the steps of a block are its channels in
    falling order, `multiple` at a time, and a step's score is their mean.

    Args:
        blocks: whose units are chosen.
        importance: of these blocks.
        keep_heads: share of the groups; 1.0 keeps all.
        keep_ffn: share of the channels; 1.0 keeps all, else whole steps stay.
        scope: where the units compete.
        multiple: of the channels that a block keeps.

    Raises:
        ConfigError: a block has fewer channels than `multiple`.
    """
    classes = [class_groups(block.attention) for block in blocks]
    counts = _counts(importance.groups, keep_heads, scope, least=[len(own) for own in classes], step=1)
    groups = tuple(
        _by_class(scores, own, count) for scores, own, count in zip(importance.groups, classes, counts, strict=True)
    )
    if keep_ffn == 1.0:
        return Kept(groups=groups, channels=tuple(tuple(range(len(scores))) for scores in importance.channels))
    narrowest = min(len(scores) for scores in importance.channels)
    if narrowest < multiple:
        raise ConfigError(
            f"multiple={multiple} is more than the {narrowest} channels of a block; use a smaller multiple or "
            "keep_ffn=1.0."
        )
    widths = _counts(importance.channels, keep_ffn, scope, least=[1] * len(blocks), step=multiple)
    channels = tuple(_top(scores, width) for scores, width in zip(importance.channels, widths, strict=True))
    return Kept(groups=groups, channels=channels)


def _counts(scores: Sequence[Tensor], fraction: float, scope: Scope, *, least: Sequence[int], step: int) -> list[int]:
    """Units that each block keeps, multiples of `step`, `least` steps or more."""
    steps = [len(own) // step for own in scores]
    if scope == "layer":
        wanted = [_rounded(fraction * len(own) / step) for own in scores]
        return [step * min(max(want, low), high) for want, low, high in zip(wanted, least, steps, strict=True)]
    seats = min(_rounded(fraction * sum(len(own) for own in scores) / step), sum(steps)) - sum(least)
    rest = [_step_scores(own, step)[low:] for own, low in zip(scores, least, strict=True)]
    owner = torch.cat([torch.full((len(own),), index) for index, own in enumerate(rest)])
    best = torch.cat(rest).argsort(descending=True, stable=True)[: max(0, seats)]
    won = owner[best].bincount(minlength=len(scores)).tolist()
    return [step * (low + more) for low, more in zip(least, won, strict=True)]


def _step_scores(scores: Tensor, step: int) -> Tensor:
    """Mean of each whole step of the sorted scores, in falling order, of blocks made comparable."""
    scale = scores.square().mean().sqrt()
    scores = (scores / scale if scale > 0 else scores).sort(descending=True).values
    return scores[: len(scores) // step * step].view(-1, step).mean(1)


def _by_class(scores: Tensor, classes: dict[HeadClass, range], count: int) -> tuple[int, ...]:
    counts = largest_remainder([len(own) for own in classes.values()], count)
    kept = [
        own.start + index
        for own, seats in zip(classes.values(), counts, strict=True)
        for index in _top(scores[own.start : own.stop], seats)
    ]
    return tuple(kept)


def _top(scores: Tensor, count: int) -> tuple[int, ...]:
    best = scores.argsort(descending=True, stable=True)[:count]
    return tuple(best.sort().values.tolist())


def _rounded(value: float) -> int:
    """Half up: 0.5 of 5 heads are 3."""
    return int(value + 0.5)
