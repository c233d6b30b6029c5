"""What `strict` heads do beyond the near window: regions among themselves, global tokens among themselves.

Both are small dense attention, so torch's own products serve every implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilevel.attention.call import Call
from trilevel.attention.entries import choose_global, pool_weights, region_slots, tail_bias
from trilevel.attention.geometry import Geometry, slot_view


def strict_regional(
    call: Call, geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Regions attend to regions; the result is handed to every token of the region, times its gate."""
    slots = region_slots(call, geometry)
    group = q.shape[1] // k.shape[1]
    keys, share = pool_weights(k, slots, weight)
    pooled_k, pooled_v = ((share @ x).squeeze(-2) for x in (keys, slot_view(v, slots)))
    pooled_q = (share.repeat_interleave(group, 1) @ slot_view(q, slots)).squeeze(-2)
    sees = (slots.segment[:, :, None] == slots.segment[:, None]) & (slots.end > slots.start)[:, None]
    out, lse = _small_attention(pooled_q, pooled_k, pooled_v, sees, None, call.scale)
    region = slots.of_token.expand(q.shape[0], -1)
    out = out.gather(2, region[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3]))
    if call.region_gate is not None:
        out = out * (2 * call.region_gate.to(out.dtype).sigmoid()).transpose(1, 2)[..., None]
    return out, lse.gather(2, region[:, None].expand(-1, lse.shape[1], -1))


def strict_global(call: Call, geometry: Geometry, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Global tokens attend to global tokens; the result is scattered back, other tokens get 0."""
    chosen = choose_global(call, geometry)
    batch, heads, tokens, dim = q.shape
    index, valid = chosen.index.flatten(1), chosen.valid.flatten(1)
    owner = geometry.segment.expand(batch, -1).gather(1, index)
    sees = (owner[:, :, None] == owner[:, None]) & valid[:, None]
    bias = tail_bias(call)
    pick = index[:, None, :, None]
    chosen_q, chosen_k, chosen_v = (x.gather(2, pick.expand(-1, x.shape[1], -1, dim)) for x in (q, k, v))
    out, lse = _small_attention(
        chosen_q, chosen_k, chosen_v, sees, None if bias is None else bias.gather(1, index), call.scale
    )
    # unused places point at real tokens: they are sent to a row behind the last, which is cut off
    target = torch.where(valid, index, tokens)[:, None].expand(-1, heads, -1)
    full = q.new_zeros(batch, heads, tokens + 1, dim).scatter(2, target[..., None].expand_as(out), out)
    full_lse = lse.new_full((batch, heads, tokens + 1), -torch.inf).scatter(2, target, lse)
    return full[:, :, :tokens], full_lse[:, :, :tokens]


def _small_attention(
    q: Tensor, k: Tensor, v: Tensor, sees: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention among a few entries; sees (batch or 1, queries, entries), bias (batch, entries)."""
    batch, heads, queries, dim = q.shape
    groups = k.shape[1]
    q = q.view(batch, groups, heads // groups, queries, dim)
    logits = (q * scale) @ k[:, :, None].transpose(-1, -2)
    if bias is not None:
        logits = logits + bias[:, None, None, None].to(logits.dtype)
    # a row that sees nothing keeps finite logits; its output is never read
    blind = ~sees.any(-1, keepdim=True)
    logits = torch.where((sees | blind)[:, None, None], logits, -torch.inf)
    out = torch.softmax(logits, -1) @ v[:, :, None]
    return out.reshape(batch, heads, queries, dim), logits.logsumexp(-1).reshape(batch, heads, queries)
