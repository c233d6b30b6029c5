"""The entries of a head class beyond its near window: tokens, region summaries and the remainder.

Shared by implementations that compute *near block + dense tail + folded remainder* (DESIGN.md section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trilevel.attention.call import Call
from trilevel.attention.geometry import Geometry, Slots, make_slots, segmented_cumsum, slot_view
from trilevel.attention.select import GlobalTokens, select_global, selection_bias


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTail:
    """Real tokens a head reads beyond its window.

    Shared by all queries of a row: index, rank, segment, valid, bias of shape (batch, tail). `set_of_token` is None.
    Per query (causal selection): the same of shape (batch, sets, p) and `set_of_token` (batch or 1, tokens).
    """

    index: Tensor
    rank: Tensor
    segment: Tensor
    valid: Tensor
    bias: Tensor | None
    set_of_token: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionTail:
    """Region summaries, key and value (batch, kv_heads, regions, dim)."""

    key: Tensor
    value: Tensor
    slots: Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Remainder:
    """Plain sums of what no other entry represents.

    key_sum, value_sum: (batch, kv_heads, 1 or tokens, dim), in at least float32. count: (batch or 1, tokens), how many
    tokens the sums hold, before the near window and the token tail are subtracted. start: (batch or 1, tokens), first
    rank they hold; tail tokens before it are in another entry. `holds_near`: the sums hold the near window.
    """

    key_sum: Tensor
    value_sum: Tensor
    count: Tensor
    start: Tensor
    holds_near: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Everything one head class sees beyond its near window."""

    tokens: TokenTail | None = None
    regions: RegionTail | None = None
    remainder: Remainder | None = None


def local_entries(call: Call, geometry: Geometry, key: Tensor, value: Tensor) -> Entries:
    """Sinks and the remainder."""
    sinks = call.levels.num_sinks
    tail = _sink_tail(geometry, sinks, key.shape[0]) if sinks else None
    return Entries(tokens=tail, remainder=_remainder(call, geometry, key, value))


def regional_entries(call: Call, geometry: Geometry, key: Tensor, value: Tensor, weight: Tensor | None) -> Entries:
    """A summary a region; causal: the tokens in no complete region as remainder."""
    slots = region_slots(call, geometry)
    tail = pool_regions(key, value, slots, weight)
    return Entries(regions=tail, remainder=_open_region(call, geometry, slots, key, value) if call.is_causal else None)


def global_entries(call: Call, geometry: Geometry, key: Tensor, value: Tensor, weight: Tensor | None) -> Entries:
    """Global tokens and the remainder; with `union` the region summaries in its place."""
    chosen = choose_global(call, geometry)
    tail = _global_tail(call, geometry, chosen)
    if not call.levels.union:
        return Entries(tokens=tail, remainder=_remainder(call, geometry, key, value))
    slots = region_slots(call, geometry)
    return Entries(
        tokens=tail,
        regions=pool_regions(key, value, slots, weight),
        remainder=_open_region(call, geometry, slots, key, value) if call.is_causal else None,
    )


def region_slots(call: Call, geometry: Geometry) -> Slots:
    """The regions of the levels."""
    return make_slots(geometry, size=call.levels.region_size, num_slots=call.levels.num_regions)


def choose_global(call: Call, geometry: Geometry) -> GlobalTokens:
    """The global tokens of the call."""
    score = call.score
    if score is None:
        score = call.query.new_zeros(call.query.shape[0], call.query.shape[2])
    return select_global(
        score,
        call.forced,
        geometry,
        num_global_tokens=call.levels.num_global_tokens,
        chunk=call.levels.chunk if call.is_causal else None,
    )


def pool_weights(key: Tensor, slots: Slots, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys by region (batch, kv_heads, regions, size, dim) and their pooling weights (..., 1, size)."""
    keys = slot_view(key, slots)
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    filled = slots.filled[:, None]
    if weight is None:
        mean = filled.to(keys.dtype) / filled.sum(-1, keepdim=True).clamp(min=1)
        return keys, mean[..., None, :].expand(keys.shape[0], keys.shape[1], -1, -1, -1)
    logit = (keys * weight.to(keys.dtype)[:, None, None, :]).sum(-1)
    # an unused region keeps finite logits, its weights are zeroed afterwards
    empty = ~filled.any(-1, keepdim=True)
    share = torch.softmax(torch.where(filled | empty, logit, -torch.inf), -1)
    return keys, torch.where(filled, share, 0)[..., None, :]


def pool_regions(key: Tensor, value: Tensor, slots: Slots, weight: Tensor | None) -> RegionTail:
    """One summary a region: softmax(u_h . k_j)-weighted keys and values."""
    keys, share = pool_weights(key, slots, weight)
    values = slot_view(value, slots).to(keys.dtype)
    return RegionTail(key=(share @ keys).squeeze(-2), value=(share @ values).squeeze(-2), slots=slots)


def tail_bias(call: Call) -> Tensor | None:
    """c_j of every token, (batch, tokens), or None without a score."""
    return None if call.score is None else selection_bias(call.score, call.levels.selection_gradient)


def _global_tail(call: Call, geometry: Geometry, chosen: GlobalTokens) -> TokenTail:
    bias = tail_bias(call)
    batch, sets, count = chosen.index.shape
    flat = chosen.index.reshape(batch, sets * count)
    tail = TokenTail(
        index=flat,
        rank=geometry.rank.expand(batch, -1).gather(1, flat),
        segment=geometry.segment.expand(batch, -1).gather(1, flat),
        valid=chosen.valid.reshape(batch, sets * count),
        bias=None if bias is None else bias.gather(1, flat),
        set_of_token=None,
    )
    if not call.is_causal:
        return tail
    shape = (batch, sets, count)
    return TokenTail(
        index=chosen.index,
        rank=tail.rank.view(shape),
        segment=tail.segment.view(shape),
        valid=chosen.valid,
        bias=None if tail.bias is None else tail.bias.view(shape),
        set_of_token=chosen.set_of_token,
    )


def _sink_tail(geometry: Geometry, sinks: int, batch: int) -> TokenTail:
    place = torch.arange(sinks, device=geometry.rank.device)
    rank = geometry.segment_first[..., None] + place
    valid = place < geometry.segment_count[..., None]
    segments = torch.arange(rank.shape[1], device=rank.device)[None, :, None].expand_as(rank)
    index = geometry.order.gather(1, rank.clamp(max=geometry.num_tokens - 1).flatten(1))
    return TokenTail(
        index=index.expand(batch, -1),
        rank=rank.flatten(1).expand(batch, -1),
        segment=segments.flatten(1).expand(batch, -1),
        valid=valid.flatten(1).expand(batch, -1),
        bias=None,
        set_of_token=None,
    )


def _remainder(call: Call, geometry: Geometry, key: Tensor, value: Tensor) -> Remainder:
    """Sums over the whole segment, or (causal) over its tokens before near(i)."""
    if call.is_causal:
        group = call.segment
        return Remainder(
            key_sum=_before_window(segmented_cumsum(key, group), geometry, call),
            value_sum=_before_window(segmented_cumsum(value, group), geometry, call),
            count=geometry.low - geometry.first,
            start=geometry.first,
            holds_near=False,
        )
    return Remainder(
        key_sum=_segment_sum(key, geometry, call),
        value_sum=_segment_sum(value, geometry, call),
        count=geometry.last - geometry.first,
        start=geometry.first,
        holds_near=True,
    )


def _segment_sum(x: Tensor, geometry: Geometry, call: Call) -> Tensor:
    if call.segment is None:
        return x.sum(2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, heads, tokens, dim = x.shape
    group = geometry.segment.expand(batch, -1)
    index = group[:, None, :, None].expand(batch, heads, tokens, dim)
    sums = x.new_zeros(batch, heads, call.num_segments, dim).scatter_add(2, index, x)
    return sums.gather(2, index)


def _before_window(prefix: Tensor, geometry: Geometry, call: Call, group: Tensor | None = None) -> Tensor:
    """The prefix at position i - w - 1 where that position is in the group of i, else 0."""
    shift = call.levels.radius + 1
    position = torch.arange(geometry.num_tokens, device=prefix.device)
    source = (position - shift).clamp(min=0)
    same = (position >= shift)[None]
    run = call.segment if group is None else group
    if run is not None:
        same = same & (run[:, source] == run)
    return torch.where(same[:, None, :, None], prefix[:, :, source], 0)


def _open_region(call: Call, geometry: Geometry, slots: Slots, key: Tensor, value: Tensor) -> Remainder:
    """Causal: tokens of the region of i before near(i), unless i completes that region."""
    region = slots.of_token
    start = slots.start.gather(1, region)
    # a region is whole for query i once i itself is its last token
    whole = slots.full.gather(1, region) & (geometry.rank + 1 >= slots.end.gather(1, region))
    count = torch.where(whole, 0, (geometry.low - start).clamp(min=0))
    keep = (count > 0)[:, None, :, None]
    sums = [
        torch.where(keep, _before_window(_region_cumsum(x, slots), geometry, call, region), 0) for x in (key, value)
    ]
    return Remainder(key_sum=sums[0], value_sum=sums[1], count=count, start=start, holds_near=False)


def _region_cumsum(x: Tensor, slots: Slots) -> Tensor:
    """Running sum that starts anew in every region, (batch, kv_heads, tokens, dim), float32 at least."""
    if not slots.is_view:
        return segmented_cumsum(x, slots.of_token)
    blocks = slot_view(x.to(torch.promote_types(x.dtype, torch.float32)), slots)
    return blocks.cumsum(3).flatten(2, 3)[:, :, : x.shape[2]]
