"""Where tokens stand: ranks, near windows, segments and equal slots of a row, all as O(tokens) integer tensors.

Everything is counted in *ranks*, the number of real tokens before a position in its row. In rank space near(i), a
segment and a region are intervals, so every count is a difference of interval ends; no n x n tensor is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Geometry:
    """Intervals in rank space, shapes (batch or 1, tokens) unless said otherwise; intervals are half open.

    rank: real tokens before the position in its row. low, high: near(i). first, last: the segment. order: position
    of the token of a given rank (ranks of padding come last). segment: segment index. segment_first, segment_count:
    (batch or 1, segments). valid: None when every token is real. num_tokens: tokens in a row.
    """

    rank: Tensor
    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor
    order: Tensor
    segment: Tensor
    segment_first: Tensor
    segment_count: Tensor
    valid: Tensor | None
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Slots:
    """Consecutive groups of a segment's real tokens (regions, selection chunks).

    start, end: (batch or 1, slots) rank interval, empty for unused slots. segment, full: (batch or 1, slots), whose it
    is and whether it has all its tokens. index, filled: (batch or 1, slots, size), positions and whether the place is
    used. of_token: (batch or 1, tokens) slot of a token. offset: (batch or 1, segments) first slot of a segment.
    is_view: the slots are the plain blocks of the row (no padding, one segment).
    """

    start: Tensor
    end: Tensor
    segment: Tensor
    full: Tensor
    index: Tensor
    filled: Tensor
    of_token: Tensor
    offset: Tensor
    is_view: bool


def make_geometry(
    tokens: int,
    *,
    radius: int,
    valid: Tensor | None,
    segment: Tensor | None,
    num_segments: int,
    is_causal: bool,
    device: torch.device,
) -> Geometry:
    """Ranks, near windows and segments of a batch of rows; batch is 1 when neither padding nor segments are given."""
    position = torch.arange(tokens, device=device)[None]
    reach = position + (1 if is_causal else radius + 1)
    if valid is None and segment is None:
        zero = torch.zeros_like(position)
        end = torch.full_like(position, tokens)
        return Geometry(
            rank=position,
            low=(position - radius).clamp(min=0),
            high=torch.minimum(reach, end),
            first=zero,
            last=end,
            order=position,
            segment=zero,
            segment_first=zero[:, :1],
            segment_count=end[:, :1],
            valid=None,
            num_tokens=tokens,
        )
    return _masked_geometry(position, reach, radius, valid, segment, num_segments)


def _masked_geometry(
    position: Tensor, reach: Tensor, radius: int, valid: Tensor | None, segment: Tensor | None, num_segments: int
) -> Geometry:
    tokens = position.shape[1]
    real = torch.ones_like(segment, dtype=torch.bool) if valid is None and segment is not None else valid
    assert real is not None
    group = torch.zeros_like(real, dtype=torch.long) if segment is None else segment
    before = torch.nn.functional.pad(real.long().cumsum(1), (1, 0))
    count = real.new_zeros(real.shape[0], num_segments, dtype=torch.long).scatter_add(1, group, real.long())
    first_of = count.cumsum(1) - count
    first = first_of.gather(1, group)
    last = first + count.gather(1, group)
    low = before.gather(1, (position - radius).clamp(min=0).expand_as(group))
    high = before.gather(1, reach.clamp(max=tokens).expand_as(group))
    return Geometry(
        rank=before[:, :-1],
        low=torch.maximum(low, first),
        high=torch.minimum(high, last),
        first=first,
        last=last,
        order=torch.argsort((~real).long(), dim=1, stable=True),
        segment=group,
        segment_first=first_of,
        segment_count=count,
        valid=valid,
        num_tokens=tokens,
    )


def make_slots(geometry: Geometry, *, size: int | None, num_slots: int | None) -> Slots:
    """Cut every segment's real tokens into slots of `size`, or into `num_slots` slots of equal size."""
    tokens = geometry.num_tokens
    num_segments = geometry.segment_count.shape[1]
    count = geometry.segment_count
    if size is not None:
        total = (tokens + size - 1) // size + (num_segments - 1 if num_segments > 1 else 0)
        widest = size
        size_of = torch.full_like(count, size)
        slots_of = (count + size - 1) // size
    else:
        assert num_slots is not None
        total = num_slots * num_segments
        widest = (tokens + num_slots - 1) // num_slots
        size_of = ((count + num_slots - 1) // num_slots).clamp(min=1)
        slots_of = torch.full_like(count, num_slots)
    upto = slots_of.cumsum(1)
    slot = torch.arange(total, device=count.device).expand(count.shape[0], total).contiguous()
    owner = torch.searchsorted(upto, slot, right=True) if num_segments > 1 else torch.zeros_like(slot)
    used = slot < upto[:, -1:]
    owner = owner.clamp(max=num_segments - 1)
    offset = upto - slots_of
    own_size = size_of.gather(1, owner)
    begin = geometry.segment_first.gather(1, owner)
    stop = begin + count.gather(1, owner)
    start = torch.minimum(begin + (slot - offset.gather(1, owner)) * own_size, stop)
    start = torch.where(used, start, stop)
    end = torch.minimum(start + own_size, stop)
    ranks = start[..., None] + torch.arange(widest, device=count.device)
    filled = ranks < end[..., None]
    index = geometry.order.gather(1, ranks.clamp(max=tokens - 1).flatten(1)).view_as(ranks)
    local = (geometry.rank - geometry.first) // size_of.gather(1, geometry.segment)
    return Slots(
        start=start,
        end=end,
        segment=owner,
        full=(end - start) == own_size,
        index=index,
        filled=filled,
        of_token=(local + offset.gather(1, geometry.segment)).clamp(max=total - 1),
        offset=offset,
        is_view=geometry.order is geometry.rank,
    )


def slot_view(x: Tensor, slots: Slots) -> Tensor:
    """Tokens of every slot, (batch, heads, tokens, dim) -> (batch, heads, slots, size, dim); unused places are 0."""
    batch, heads, tokens, dim = x.shape
    num_slots, size = slots.index.shape[1:]
    if slots.is_view:
        padded = torch.nn.functional.pad(x, (0, 0, 0, num_slots * size - tokens))
        return padded.reshape(batch, heads, num_slots, size, dim)
    index = slots.index.expand(batch, -1, -1).reshape(batch, 1, num_slots * size, 1)
    gathered = x.gather(2, index.expand(batch, heads, num_slots * size, dim))
    gathered = gathered.view(batch, heads, num_slots, size, dim)
    return torch.where(slots.filled[:, None, :, :, None], gathered, 0)


def segmented_cumsum(x: Tensor, group: Tensor | None) -> Tensor:
    """Running sum over tokens that starts anew in every group; x (batch, heads, tokens, dim), group (batch, tokens).

    Groups are runs. Sums are built by doubling, never by subtracting two prefixes, so that a large value in one group
    costs no digits in the next. Sums are float32 at least.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if group is None:
        return x.cumsum(2)
    tokens = x.shape[2]
    # a dynamic length is traced for inputs of up to 2**24 tokens
    steps = (tokens - 1).bit_length() if isinstance(tokens, int) else 24
    position = torch.arange(tokens, device=x.device)
    for step in range(steps):
        source = (position - 2**step).clamp(min=0)
        same = (position >= 2**step) & (group[:, source] == group)
        x = x + torch.where(same[:, None, :, None], x[:, :, source], 0)
    return x
