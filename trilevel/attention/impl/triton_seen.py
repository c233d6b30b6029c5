"""What the heads of a class see beyond their near window, in the tensors that the kernels of `impl/triton.py` read.

Token tails become sets: a set a segment (bidirectional), or a set a selection chunk (causal); a query reads one set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trilevel.attention.call import Call
from trilevel.attention.entries import Entries, RegionTail, TokenTail
from trilevel.attention.geometry import Geometry

NONE = torch.iinfo(torch.int32).max


class Vectors(NamedTuple):
    """The differentiable part; None where the class has no such entries.

    Shapes: tail_key, tail_value (batch, kv_heads, sets, width, dim), tail_bias (batch, sets, width) float32,
    region_key, region_value (batch, kv_heads, regions, dim), key_sum, value_sum (batch, kv_heads, 1 or tokens, dim)
    float32.
    """

    tail_key: Tensor | None = None
    tail_value: Tensor | None = None
    tail_bias: Tensor | None = None
    region_key: Tensor | None = None
    region_value: Tensor | None = None
    key_sum: Tensor | None = None
    value_sum: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The int32 part.

    rows: (batch or 1, fields, tokens), the fields as `triton_kernels` numbers them; None where ranks are positions and
    every query sees every set and region. tail_rank: (batch, sets, width), -1 for unused places. span: (batch or 1, 3,
    regions), first rank, last + 1, and the rank from which a causal query sees the region. tail_readers,
    region_readers: (batch or 1, 2, sets or regions), positions from the first query that may read it to the last + 1.
    """

    rows: Tensor | None
    tail_rank: Tensor | None
    tail_readers: Tensor | None
    span: Tensor | None
    region_readers: Tensor | None


def seen_by(call: Call, geometry: Geometry | None, entries: Entries, k: Tensor, v: Tensor) -> tuple[Seen, Vectors]:
    """Both parts for the queries of a class whose keys and values are `k` and `v`.

    `geometry` is None for heads that see their near window alone in rows without padding and segments.
    """
    if geometry is None:
        return Seen(rows=None, tail_rank=None, tail_readers=None, span=None, region_readers=None), Vectors()
    tail, regions, remainder = entries.tokens, entries.regions, entries.remainder
    places, rank, own = (None, None, None) if tail is None else _sets(tail, geometry)
    seen = Seen(
        rows=_rows(call, geometry, entries, own),
        tail_rank=rank,
        tail_readers=None if own is None or rank is None else _readers(own, rank.shape[1]).int(),
        span=None if regions is None else _span(regions),
        region_readers=None if regions is None else _region_readers(call, geometry, regions),
    )
    vectors = Vectors(
        tail_key=None if places is None else _pick(k, places),
        tail_value=None if places is None else _pick(v, places),
        tail_bias=None if tail is None or tail.bias is None or places is None else tail.bias.view_as(places).float(),
        # a summary is rounded like the keys it stands for
        region_key=None if regions is None else regions.key.to(k.dtype).contiguous(),
        region_value=None if regions is None else regions.value.to(v.dtype).contiguous(),
        key_sum=None if remainder is None else remainder.key_sum.contiguous(),
        value_sum=None if remainder is None else remainder.value_sum.contiguous(),
    )
    return seen, vectors


def _sets(tail: TokenTail, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Positions and ranks of the tail tokens by set, (batch, sets, width), and the set of each query."""
    own = tail.set_of_token
    if own is None:
        # tokens of a segment stand together
        sets = geometry.segment_count.shape[1]
        shape = (tail.index.shape[0], sets, tail.index.shape[1] // sets)
        own = geometry.segment
    else:
        shape = (tail.index.shape[0], tail.index.shape[1], tail.index.shape[2])
    rank = torch.where(tail.valid, tail.rank, -1).int()
    return tail.index.reshape(shape), rank.reshape(shape).contiguous(), own


def _pick(x: Tensor, places: Tensor) -> Tensor:
    batch, heads, _, dim = x.shape
    index = places.reshape(batch, 1, -1, 1).expand(-1, heads, -1, dim)
    return x.gather(2, index).view(batch, heads, *places.shape[1:], dim)


def _rows(call: Call, geometry: Geometry, entries: Entries, own: Tensor | None) -> Tensor | None:
    if call.valid is None and call.segment is None and not call.is_causal:
        return None
    zero = torch.zeros_like(geometry.rank)
    first, last = (zero, zero) if entries.regions is None else _region_range(call, geometry, entries.regions)
    fields = [
        geometry.rank if geometry.valid is None else torch.where(geometry.valid, geometry.rank, -1),
        geometry.rank,
        geometry.low,
        geometry.high,
        zero if own is None else own,
        zero if entries.remainder is None else entries.remainder.count,
        zero if entries.remainder is None else entries.remainder.start,
        first,
        last,
    ]
    batch = max(field.shape[0] for field in fields)
    return torch.stack([field.int().expand(batch, -1) for field in fields], 1)


def _region_range(call: Call, geometry: Geometry, regions: RegionTail) -> tuple[Tensor, Tensor]:
    """First and last + 1 of the regions of a query's segment, causal: up to its own."""
    slots = regions.slots
    first = slots.offset.gather(1, geometry.segment)
    if call.is_causal:
        return first, slots.of_token + 1
    behind = torch.nn.functional.pad(slots.offset[:, 1:], (0, 1), value=slots.start.shape[1])
    return first, behind.gather(1, geometry.segment)


def _span(regions: RegionTail) -> Tensor:
    slots = regions.slots
    return torch.stack([slots.start, slots.end, torch.where(slots.full, slots.end, NONE)], 1).int()


def _readers(own: Tensor, count: int) -> Tensor:
    """(batch or 1, 2, count): first position and last + 1 of the queries whose number in `own` is that; -1 is none."""
    tokens = own.shape[1]
    place = torch.arange(tokens, device=own.device).expand_as(own)
    number = own.clamp(min=0)
    first = place.new_full((own.shape[0], count), tokens)
    first = first.scatter_reduce(1, number, torch.where(own < 0, tokens, place), "amin")
    last = place.new_zeros(own.shape[0], count).scatter_reduce(1, number, torch.where(own < 0, 0, place + 1), "amax")
    return torch.stack([first, last], 1)


def _region_readers(call: Call, geometry: Geometry, regions: RegionTail) -> Tensor:
    slots = regions.slots
    by_segment = _readers(geometry.segment, geometry.segment_count.shape[1])
    first, last = (x.gather(1, slots.segment) for x in by_segment.unbind(1))
    if call.is_causal:
        # from the query that is the region's last token on
        closing = geometry.order.gather(1, (slots.end - 1).clamp(min=0))
        first = torch.where(slots.full, torch.maximum(first, closing), geometry.num_tokens)
        last = torch.where(slots.full, last, 0)
    return torch.stack([first, last], 1).int()
