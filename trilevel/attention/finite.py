"""Non-finite values reach the rows that see them and no others.

A product with weight 0 still makes NaN of a NaN, so hidden tokens are zeroed before any sum, and the rows that do see a
non-finite token are set to NaN afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trilevel.attention.call import Call
from trilevel.attention.geometry import Geometry


def finite_only(call: Call) -> tuple[Call, Tensor, Tensor]:
    """The call with padding and non-finite tokens set to 0.

    Returns:
        The call, which real tokens had a non-finite key, value or score, and which a non-finite query or gate, both
        (batch, tokens) bool.
    """
    real = torch.ones_like(call.query[:, 0, :, 0], dtype=torch.bool) if call.valid is None else call.valid
    fine_query, fine = _finite(call.query), _finite(call.key) & _finite(call.value)
    score, gate = call.score, call.region_gate
    if score is not None:
        score = torch.where(real & score.isfinite(), score, 0)
        fine = fine & (score == call.score)
    if gate is not None:
        fine_query = fine_query & gate.isfinite().all(-1)
        gate = torch.where((real & fine_query)[..., None], gate, 0)
    clean = replace(
        call,
        query=_keep(call.query, real & fine_query),
        key=_keep(call.key, real & fine),
        value=_keep(call.value, real & fine),
        score=score,
        region_gate=gate,
    )
    return clean, real & ~fine, real & ~fine_query


def sees_any(token: Tensor, geometry: Geometry, *, is_causal: bool) -> Tensor:
    """Whether a row sees a marked token: one of its segment, causal: up to itself; (batch, tokens) bool."""
    marked = token.long()
    group = geometry.segment.expand_as(marked)
    num_segments = geometry.segment_count.shape[1]
    per_segment = marked.new_zeros(marked.shape[0], num_segments).scatter_add(1, group, marked)
    if not is_causal:
        return per_segment.gather(1, group) > 0
    before = (per_segment.cumsum(1) - per_segment).gather(1, group)
    return marked.cumsum(1) > before


def hide_nonfinite(call: Call, geometry: Geometry) -> tuple[Call, Tensor | None]:
    """Zero what no query may see, and say which rows see a non-finite token (None where all rows see all tokens)."""
    if call.valid is None and not call.is_causal and call.segment is None:
        return call, None
    clean, bad, bad_query = finite_only(call)
    seen = sees_any(bad, geometry, is_causal=call.is_causal) | bad_query
    return clean, seen if call.valid is None else seen & call.valid


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().all(-1).all(1)


def _keep(x: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(tokens[:, None, :, None], x, 0)
