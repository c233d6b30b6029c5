"""Small attention calls that cover what `multi_level_attention` can be asked for; sizes are different primes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trilevel.attention.api import Impl
from trilevel.attention.levels import LevelRatio, Levels

IMPLEMENTATIONS: list[Impl] = ["reference", "blocked"]
EACH = LevelRatio(1, 1, 1)
BASE = Levels(ratio=EACH, window=3, region_size=4, num_global_tokens=3)
STRICT = replace(BASE, mode="strict")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to call with; `inputs` makes the tensors."""

    name: str
    levels: Levels = BASE
    batch: int = 2
    heads: int = 3
    kv_heads: int = 3
    tokens: int = 19
    dim: int = 5
    is_causal: bool = False
    # which tokens of a row are padding: a key of PADDINGS
    padding: str | None = None
    # lengths of the segments of each row
    segments: tuple[tuple[int, ...], ...] | None = None
    scale: float | None = None
    # False: no score, prior, forced tokens, pooling weights or region gate
    extras: bool = True
    without: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return self.name


def padding_mask(kind: str, batch: int, tokens: int) -> Tensor:
    """True is padding; every row has its own amount of it."""
    mask = torch.zeros(batch, tokens, dtype=torch.bool)
    for row in range(batch):
        count = min(3 * row + 2, tokens)
        if kind == "right":
            mask[row, tokens - count :] = True
        elif kind == "left":
            mask[row, :count] = True
        elif kind == "middle":
            mask[row, tokens // 3 : tokens // 3 + count] = True
        elif kind == "scattered":
            mask[row, row :: row + 3] = True
        elif kind == "whole_row":
            mask[row] = row == 0
        else:
            raise ValueError(kind)
    return mask


def segment_ids(lengths: tuple[tuple[int, ...], ...], tokens: int) -> Tensor:
    """Ids 0, 1, ... per row from the lengths; a length of 0 leaves an id out, the last segment takes what is left."""
    rows = []
    for row in lengths:
        ids = [index for index, length in enumerate(row) for _ in range(length)]
        rows.append((ids + [len(row)] * tokens)[:tokens])
    return torch.tensor(rows)


def inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 7) -> dict[str, Any]:
    """Keyword arguments of `multi_level_attention` for the case, `impl` and `return_lse` left out."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    split = case.levels.ratio.split(case.heads, case.kv_heads)
    arguments: dict[str, Any] = {
        "query": normal(case.batch, case.heads, case.tokens, case.dim),
        "key": normal(case.batch, case.kv_heads, case.tokens, case.dim),
        "value": normal(case.batch, case.kv_heads, case.tokens, case.dim),
        "levels": case.levels,
        "is_causal": case.is_causal,
        "scale": case.scale,
    }
    if case.padding is not None:
        arguments["padding_mask"] = padding_mask(case.padding, case.batch, case.tokens)
    if case.segments is not None:
        arguments["segment_ids"] = segment_ids(case.segments, case.tokens)
        arguments["num_segments"] = int(arguments["segment_ids"].max()) + 1
    if case.extras:
        arguments["pool_weight"] = normal(case.kv_heads, case.dim)
        # one decimal, so that there are ties
        arguments["global_score"] = (normal(case.batch, case.tokens) * 3).round() / 3
        arguments["global_prior"] = (normal(case.batch, case.tokens) * 2).round() / 2
        arguments["global_forced"] = _forced(case, arguments, draw)
        if case.levels.mode == "strict" and split.regional:
            arguments["region_gate"] = normal(case.batch, case.tokens, split.regional)
    return {name: value for name, value in arguments.items() if name not in case.without}


def _forced(case: Case, arguments: dict[str, Any], draw: torch.Generator) -> Tensor:
    """Some forced tokens, padding among them, no more real ones in a segment than there may be global tokens."""
    forced = torch.rand(case.batch, case.tokens, generator=draw) < 0.15
    blank = torch.zeros(case.batch, case.tokens)
    padding, segment = arguments.get("padding_mask", blank.bool()), arguments.get("segment_ids", blank.long())
    for row, column in forced.nonzero().tolist():
        of_segment = forced[row, : column + 1] & ~padding[row, : column + 1]
        of_segment &= segment[row, : column + 1] == segment[row, column]
        forced[row, column] &= of_segment.sum() <= case.levels.num_global_tokens
    return forced


def clone(arguments: dict[str, Any], *, requires_grad: bool = False) -> dict[str, Any]:
    """The same arguments in new tensors; floating ones are leaves that collect gradients if asked for."""
    return {
        name: value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def gradients(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients that a backward pass left on the tensors; zeros where none arrived."""
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _with(**changes: Any) -> Levels:
    return replace(BASE, **changes)


def _bidirectional_or_causal(name: str, **changes: Any) -> list[Case]:
    return [
        Case(name=f"{name}-{'causal' if causal else 'both_ways'}", is_causal=causal, **changes)
        for causal in (False, True)
    ]


_ROWS = ((5, 11), (3, 0, 4, 7))

CALIBRATED = [
    *_bidirectional_or_causal("base"),
    *_bidirectional_or_causal("no_extras", extras=False),
    *_bidirectional_or_causal("prior_only", without=("global_score", "global_forced", "pool_weight")),
    *_bidirectional_or_causal("scale", scale=0.31),
    *_bidirectional_or_causal("window_1", levels=_with(window=1)),
    *_bidirectional_or_causal("window_7", levels=_with(window=7)),
    *_bidirectional_or_causal("window_over_all", levels=_with(window=41)),
    *_bidirectional_or_causal("regions_of_1", levels=_with(region_size=1)),
    *_bidirectional_or_causal("regions_of_5", levels=_with(region_size=5, window=5)),
    *_bidirectional_or_causal("one_large_region", levels=_with(region_size=97)),
    *_bidirectional_or_causal("one_global", levels=_with(num_global_tokens=1)),
    *_bidirectional_or_causal("all_global", levels=_with(num_global_tokens=97)),
    *_bidirectional_or_causal("sinks", levels=_with(num_sinks=2)),
    *_bidirectional_or_causal("all_sinks", levels=_with(num_sinks=97)),
    *_bidirectional_or_causal("union", levels=_with(union=True, num_global_tokens=5)),
    *_bidirectional_or_causal("gate", levels=_with(selection_gradient="gate")),
    *_bidirectional_or_causal("gate_no_extras", levels=_with(selection_gradient="gate"), extras=False),
    *_bidirectional_or_causal("union_gate", levels=_with(union=True, selection_gradient="gate"), padding="left"),
    *_bidirectional_or_causal("dense_below", levels=_with(dense_below=20), padding="left"),
    *_bidirectional_or_causal("not_dense_below", levels=_with(dense_below=19), padding="left"),
    *_bidirectional_or_causal("grouped", heads=10, kv_heads=5, levels=_with(ratio=LevelRatio(2, 1, 2))),
    *_bidirectional_or_causal("grouped_uneven", heads=14, kv_heads=7, levels=_with(ratio=LevelRatio(6, 3, 1))),
    *_bidirectional_or_causal("local_only", heads=2, kv_heads=1, levels=_with(ratio=LevelRatio(1, 0, 0))),
    *_bidirectional_or_causal("regional_only", heads=2, kv_heads=1, levels=_with(ratio=LevelRatio(0, 1, 0))),
    *_bidirectional_or_causal("global_only", heads=2, kv_heads=1, levels=_with(ratio=LevelRatio(0, 0, 1))),
    *_bidirectional_or_causal("one_token", tokens=1),
    *_bidirectional_or_causal("two_tokens", tokens=2),
    *(
        case
        for kind in ("right", "left", "middle", "scattered", "whole_row")
        for case in _bidirectional_or_causal(f"padding_{kind}", padding=kind, levels=_with(num_sinks=1))
    ),
    *_bidirectional_or_causal("segments", segments=_ROWS, levels=_with(num_sinks=1)),
    *_bidirectional_or_causal("segments_padding", segments=_ROWS, padding="scattered"),
    *_bidirectional_or_causal("segments_padding_right", segments=_ROWS, padding="right"),
    *_bidirectional_or_causal("segments_union", segments=_ROWS, padding="left", levels=_with(union=True)),
    *_bidirectional_or_causal("segments_of_1", segments=((1,) * 7, (1,) * 13)),
    Case(name="num_regions_1", levels=_with(region_size=None, num_regions=1)),
    Case(name="num_regions_3", levels=_with(region_size=None, num_regions=3), padding="middle"),
    Case(name="num_regions_97", levels=_with(region_size=None, num_regions=97), padding="right"),
    Case(name="num_regions_segments", levels=_with(region_size=None, num_regions=2), segments=_ROWS, padding="right"),
    Case(name="num_regions_union", levels=_with(region_size=None, num_regions=3, union=True), segments=_ROWS),
    Case(name="chunk_1", is_causal=True, levels=_with(selection_chunk=1)),
    Case(name="chunk_7", is_causal=True, levels=_with(selection_chunk=7), padding="scattered"),
    Case(name="chunk_97", is_causal=True, levels=_with(selection_chunk=97)),
    Case(name="chunk_segments", is_causal=True, levels=_with(selection_chunk=3, union=True), segments=_ROWS),
    Case(name="chunk_window_1", is_causal=True, levels=_with(window=1, num_global_tokens=2)),
]

STRICT_CASES = [
    Case(name="strict", levels=STRICT),
    Case(name="strict_no_extras", levels=STRICT, extras=False),
    Case(name="strict_scale", levels=STRICT, scale=0.31),
    Case(name="strict_window_1", levels=replace(STRICT, window=1)),
    Case(name="strict_regions_of_1", levels=replace(STRICT, region_size=1)),
    Case(name="strict_regions_of_7", levels=replace(STRICT, region_size=7)),
    Case(name="strict_one_region", levels=replace(STRICT, region_size=97)),
    Case(name="strict_num_regions", levels=replace(STRICT, region_size=None, num_regions=3), padding="middle"),
    Case(name="strict_all_global", levels=replace(STRICT, num_global_tokens=97)),
    Case(name="strict_gate", levels=replace(STRICT, selection_gradient="gate")),
    Case(name="strict_gate_no_extras", levels=replace(STRICT, selection_gradient="gate"), extras=False),
    Case(name="strict_dense_below", levels=replace(STRICT, dense_below=20), padding="left"),
    Case(name="strict_grouped", levels=replace(STRICT, ratio=LevelRatio(2, 1, 2)), heads=10, kv_heads=5),
    Case(name="strict_one_token", levels=STRICT, tokens=1),
    Case(name="strict_two_tokens", levels=STRICT, tokens=2),
    *(
        Case(name=f"strict_padding_{kind}", levels=STRICT, padding=kind)
        for kind in ("right", "left", "middle", "scattered", "whole_row")
    ),
    Case(name="strict_segments", levels=STRICT, segments=_ROWS),
    Case(name="strict_segments_padding", levels=STRICT, segments=_ROWS, padding="scattered"),
    Case(name="strict_segments_num", levels=replace(STRICT, region_size=None, num_regions=2), segments=_ROWS),
    Case(name="strict_segments_of_1", levels=STRICT, segments=((1,) * 7, (1,) * 13)),
]

CASES = CALIBRATED + STRICT_CASES
