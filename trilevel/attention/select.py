"""Which tokens are global: top-p by learned score and prior, forced ones first, ties by position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trilevel.attention.geometry import Geometry, make_slots
from trilevel.attention.levels import SelectionGradient


@dataclass(frozen=True, slots=True)
class GlobalTokens:
    """Selected tokens of every set.

    index: (batch, sets, p) positions. valid: (batch, sets, p). set_of_token: (batch or 1, tokens) the set a query
    reads, -1 for none. Bidirectional: a set a segment. Causal: a set a selection chunk.
    """

    index: Tensor
    valid: Tensor
    set_of_token: Tensor


def select_global(
    score: Tensor, forced: Tensor | None, geometry: Geometry, *, num_global_tokens: int, chunk: int | None
) -> GlobalTokens:
    """Select at most `num_global_tokens` real tokens of every segment, or (`chunk` given) of every prefix of chunks.

    Args:
        score: (batch, tokens) learned score plus prior.
        forced: (batch, tokens) bool or None, selected before any other.
        geometry: the rows.
        num_global_tokens: p.
        chunk: tokens in a selection chunk, None for bidirectional attention.
    """
    with torch.no_grad():
        strength = score if forced is None else torch.where(forced, torch.inf, score)
        count = (
            min(num_global_tokens, geometry.num_tokens)
            if isinstance(geometry.num_tokens, int)
            else (torch.sym_min(num_global_tokens, geometry.num_tokens))
        )
        if chunk is None:
            return _per_segment(strength, geometry, count)
        return _per_prefix(strength, geometry, num_global_tokens, chunk)


def selection_bias(score: Tensor, gradient: SelectionGradient) -> Tensor:
    """c_j of a selected token, (batch, tokens): log sigmoid(score), or 0 with its gradient (straight through)."""
    gate = logsigmoid(score)
    return gate if gradient == "gate" else gate - gate.detach()


def _per_segment(strength: Tensor, geometry: Geometry, count: int) -> GlobalTokens:
    batch = strength.shape[0]
    num_segments = geometry.segment_count.shape[1]
    best = torch.sort(strength, dim=1, descending=True, stable=True).indices
    owner = geometry.segment.expand(batch, -1)
    if geometry.valid is not None:
        owner = torch.where(geometry.valid, owner, num_segments)
    if geometry.valid is not None or num_segments > 1:
        by_segment = torch.sort(owner.gather(1, best), dim=1, stable=True).indices
        best = best.gather(1, by_segment)
    place = torch.arange(count, device=strength.device)
    slot = geometry.segment_first[..., None] + place
    valid = (place < geometry.segment_count[..., None]).expand(batch, -1, -1)
    slot = slot.clamp(max=geometry.num_tokens - 1).expand(batch, -1, -1)
    index = best.gather(1, slot.flatten(1)).view(batch, num_segments, -1)
    return GlobalTokens(index=index, valid=valid, set_of_token=geometry.segment)


def _per_prefix(strength: Tensor, geometry: Geometry, count: int, chunk: int) -> GlobalTokens:
    """Top `count` of all complete chunks up to each one: a scan whose merge keeps the best of two disjoint lists."""
    batch = strength.shape[0]
    slots = make_slots(geometry, size=chunk, num_slots=None)
    index = slots.index.expand(batch, -1, -1)
    num_sets = index.shape[1]
    filled = slots.filled.expand(batch, -1, -1)
    value = strength.gather(1, index.flatten(1)).view_as(index)
    index, value, filled = _best(index, value, filled, count)
    steps = (num_sets - 1).bit_length() if isinstance(num_sets, int) else 24
    owner = slots.segment.expand(batch, -1)
    position = torch.arange(num_sets, device=strength.device)
    for step in range(steps):
        source = (position - 2**step).clamp(min=0)
        joins = ((position >= 2**step) & (owner[:, source] == owner))[..., None]
        index, value, filled = _best(
            torch.cat([index[:, source], index], 2),
            torch.cat([value[:, source], value], 2),
            torch.cat([filled[:, source] & joins, filled], 2),
            count,
        )
    complete = (geometry.rank - geometry.first + 1) // chunk
    offset = slots.offset.gather(1, geometry.segment)
    last = torch.where(complete > 0, offset + complete - 1, -1)
    return GlobalTokens(index=index, valid=filled, set_of_token=last)


def _best(index: Tensor, value: Tensor, filled: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` of each list by value, earlier ones first among equals, unfilled places last."""
    # two stable sorts: by value, then by whether the place is filled at all
    order = torch.sort(value, dim=2, descending=True, stable=True).indices
    order = order.gather(2, torch.sort((~filled.gather(2, order)).long(), dim=2, stable=True).indices)
    order = order[:, :, :count]
    return index.gather(2, order), value.gather(2, order), filled.gather(2, order)
