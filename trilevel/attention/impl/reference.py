"""The truth: multi-level attention with dense masks, O(tokens^2) memory, differentiable, in any float dtype.

Every calibrated head is one rule. Its entries are single tokens (the near window, and sinks or global tokens), region
summaries at the log-count of their tokens that are not yet among the single ones, and the mean of what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trilevel.attention.call import Call


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp of a validated call: (batch, heads, tokens, dim) and (batch, heads, tokens)."""
    layout = _Layout.of(call)
    classes = {"local": _local, "regional": _regional, "global": _global}
    parts = []
    start = 0
    for (name, function), count in zip(classes.items(), call.split, strict=True):
        if count:
            heads = _Heads.of(call, layout, start, count)
            parts.append(heads.finish(*function(call, layout, heads), name))
            start += count
    out, lse = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return out.to(call.query.dtype), lse


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Which token may see which, all (batch, tokens, tokens) with queries in rows, or (batch, tokens)."""

    valid: Tensor
    visible: Tensor
    near: Tensor
    # real tokens of the segment before this one
    rank: Tensor
    # whether i may use the summary of j's region: a causal query needs its last token in the past
    closed: Tensor
    # row i holds the tokens of the region that token i opens, and nothing when it opens none
    member: Tensor
    # row i holds the tokens of i's own region
    region: Tensor
    # row i holds the global tokens that i may use
    chosen: Tensor

    @staticmethod
    def of(call: Call) -> _Layout:
        batch, _, tokens, _ = call.query.shape
        device = call.query.device
        at = torch.arange(tokens, device=device)
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=device) if call.valid is None else call.valid
        both = valid[:, :, None] & valid[:, None, :]
        if call.segment is not None:
            both = both & (call.segment[:, :, None] == call.segment[:, None, :])
        visible = both & (at[:, None] >= at) if call.is_causal else both
        rank = (both & (at[:, None] > at)).sum(-1)
        size = _region_size(call, both.sum(-1))
        region_start = rank // size * size
        region = both & (region_start[:, :, None] == region_start[:, None, :])
        closed = (
            (region_start + size)[:, None, :] <= (rank + 1)[:, :, None] if call.is_causal else torch.ones_like(both)
        )
        return _Layout(
            valid=valid,
            visible=visible,
            near=visible & ((at[:, None] - at).abs() <= call.levels.radius),
            rank=rank,
            closed=closed,
            member=region & (rank == region_start)[:, :, None],
            region=region,
            chosen=_chosen(call, both, rank),
        )


def _region_size(call: Call, length: Tensor) -> Tensor:
    if call.levels.region_size is not None:
        return torch.full_like(length, call.levels.region_size)
    assert call.levels.num_regions is not None
    return -(-length // call.levels.num_regions).clamp(max=-1)


def _chosen(call: Call, both: Tensor, rank: Tensor) -> Tensor:
    """Token j is chosen for query i when fewer than p candidates of i come before j in the order of selection."""
    candidate = both
    if call.is_causal:
        chunk = call.levels.chunk
        candidate = both & (rank[:, None, :] < ((rank + 1) // chunk * chunk)[:, :, None])
    at = torch.arange(rank.shape[1], device=rank.device)
    before = (at[:, None] < at).expand_as(both)
    for worth in (call.score, call.forced):
        if worth is not None:
            first, second = worth.detach()[:, :, None], worth.detach()[:, None, :]
            before = (first > second) | ((first == second) & before)
    better = candidate.float() @ before.float()
    return candidate & (better < call.levels.num_global_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """Vectors of one head class, keys and values repeated to its query heads; what nobody may see is zero."""

    q: Tensor
    k: Tensor
    v: Tensor
    # pooling logits, u_h.k_j for token j: (batch, heads, tokens)
    pool_logit: Tensor
    # where a query, or a key or value, was not finite: (batch, heads, tokens)
    bad_q: Tensor
    bad_kv: Tensor
    bad_score: Tensor
    layout: _Layout
    strict: bool
    scale: float

    @staticmethod
    def of(call: Call, layout: _Layout, start: int, count: int) -> _Heads:
        group = call.query.shape[1] // call.key.shape[1]
        queries, pairs = slice(start, start + count), slice(start // group, (start + count) // group)
        real = layout.valid[:, None, :, None]
        kept = []
        bad = []
        for x in (call.query[:, queries], call.key[:, pairs], call.value[:, pairs]):
            finite = x.isfinite()
            kept.append(torch.where(real & finite, x, 0))
            bad.append(real.squeeze(-1) & ~finite.all(-1))
        q, k, v = kept
        pool = torch.zeros_like(k[:, :, :, 0])
        if call.pool_weight is not None:
            pool = (k @ call.pool_weight[pairs, :, None].to(k.dtype)).squeeze(-1)
        bad_score = torch.zeros_like(layout.valid) if call.score is None else ~call.score.isfinite()
        return _Heads(
            q=q,
            k=k.repeat_interleave(group, 1),
            v=v.repeat_interleave(group, 1),
            pool_logit=pool.repeat_interleave(group, 1),
            bad_q=bad[0],
            bad_kv=(bad[1] | bad[2]).repeat_interleave(group, 1),
            bad_score=(bad_score & layout.valid)[:, None],
            layout=layout,
            strict=call.levels.mode == "strict",
            scale=call.scale,
        )

    def pooled(self, x: Tensor) -> Tensor:
        """Region summaries, each in the slot of the token that opens the region: (batch, heads, tokens, dim)."""
        weights, _ = _softmax(_masked(self.pool_logit[:, :, None, :], self.layout.member[:, None]))
        return weights.to(x.dtype) @ x

    def finish(self, out: Tensor, lse: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """NaN for queries that see something not finite."""
        seen = self.layout.near if self.strict and name == "local" else self.layout.visible
        if self.strict and name == "global":
            seen = self.layout.chosen & self.layout.chosen.transpose(1, 2)
        bad_q = self.bad_q
        if self.strict and name == "regional":
            bad_q = _any(self.layout.region, bad_q)
        bad = bad_q & lse.isfinite() | _any(seen, self.bad_kv)
        if name == "global":
            bad = bad | _any(self.layout.visible, self.bad_score)
        return out.masked_fill(bad[..., None], torch.nan), lse.masked_fill(bad, torch.nan)


def _any(seen: Tensor, flag: Tensor) -> Tensor:
    """Whether row i of `seen` (batch, tokens, tokens) holds a token with `flag` (batch, heads, tokens)."""
    return (seen[:, None].float() @ flag[..., None].float()).squeeze(-1) > 0


def _local(call: Call, layout: _Layout, heads: _Heads) -> tuple[Tensor, Tensor]:
    if heads.strict:
        return _tokens_only(heads, layout.near, None)
    sinks = layout.visible & (layout.rank < call.levels.num_sinks)[:, None, :]
    return _partition(heads, sinks, None, regions=False)


def _regional(call: Call, layout: _Layout, heads: _Heads) -> tuple[Tensor, Tensor]:
    if heads.strict:
        return _regions_to_regions(call, layout, heads)
    return _partition(heads, torch.zeros_like(layout.near), None, regions=True)


def _global(call: Call, layout: _Layout, heads: _Heads) -> tuple[Tensor, Tensor]:
    bias = _selection_bias(call, layout)
    if heads.strict:
        return _tokens_only(heads, layout.chosen & layout.chosen.transpose(1, 2), bias)
    return _partition(heads, layout.chosen, bias, regions=call.levels.union)


def _selection_bias(call: Call, layout: _Layout) -> Tensor:
    """c_j (batch, tokens): log sigmoid of the score, or a zero that has its gradient."""
    score = call.query.new_zeros(layout.valid.shape)
    if call.score is not None:
        # zeroed before the logarithm, so that no gradient of what nobody may see is 0 * inf
        score = torch.where(layout.valid & call.score.isfinite(), call.score, 0)
    gate = F.logsigmoid(score.to(_stats(call.query)))
    return gate if call.levels.selection_gradient == "gate" else gate - gate.detach()


def _tokens_only(heads: _Heads, seen: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = _logits(heads.q, heads.k, heads.scale)
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    weights, lse = _softmax(_masked(logits, seen[:, None]))
    return _mix(weights, heads.v), lse


def _regions_to_regions(call: Call, layout: _Layout, heads: _Heads) -> tuple[Tensor, Tensor]:
    """Strict regional heads: regions attend to regions, each token gets its region's output times its gate."""
    opens = layout.member.any(-1)
    pairs = layout.visible & opens[:, :, None] & opens[:, None, :]
    weights, lse = _softmax(_masked(_logits(heads.pooled(heads.q), heads.pooled(heads.k), heads.scale), pairs[:, None]))
    out = _mix(weights, heads.pooled(heads.v))
    slot = layout.member.to(torch.int64).argmax(1)[:, None]
    out = torch.gather(out, 2, slot[..., None].expand_as(out)) * layout.valid[:, None, :, None]
    lse = torch.gather(lse, 2, slot.expand_as(lse)).masked_fill(~layout.valid[:, None], -torch.inf)
    if call.region_gate is not None:
        gate = torch.where(layout.valid[..., None], call.region_gate, 0).to(out.dtype).transpose(1, 2)[..., None]
        finite = gate.isfinite()
        out = (out * (2 * torch.where(finite, gate, 0).sigmoid())).masked_fill(~finite, torch.nan)
    return out, lse


def _partition(heads: _Heads, single: Tensor, bias: Tensor | None, *, regions: bool) -> tuple[Tensor, Tensor]:
    """Near tokens, `single` ones (with `bias` on their logits), region summaries if asked for, and the remainder."""
    layout = heads.layout
    single = single & layout.visible & ~layout.near
    outside = layout.visible & ~layout.near & ~single
    summarised = outside & layout.closed if regions else torch.zeros_like(outside)
    return _attend_partition(heads, single, bias, summarised, outside & ~summarised)


def _attend_partition(
    heads: _Heads, single: Tensor, bias: Tensor | None, summarised: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    layout = heads.layout
    logits = _logits(heads.q, heads.k, heads.scale)
    if bias is not None:
        logits = logits + torch.where(single, bias[:, None, :], 0)[:, None]
    token_logits = _masked(logits, (layout.near | single)[:, None])

    stats = logits.dtype
    count = summarised.to(stats) @ layout.member.to(stats).transpose(1, 2)
    keys, values = heads.pooled(heads.k), heads.pooled(heads.v)
    region_logits = _masked(_logits(heads.q, keys, heads.scale) + _log(count)[:, None], (count > 0)[:, None])

    left = rest.sum(-1)[:, None].to(stats)
    mean = rest[:, None].to(stats) / left.clamp(min=1)[..., None]
    rest_key, rest_value = mean @ heads.k.to(stats), mean @ heads.v.to(stats)
    rest_logits = heads.scale * (heads.q.to(stats) * rest_key).sum(-1) + _log(left)

    n = token_logits.shape[-1]
    logits = torch.cat([token_logits, region_logits, _masked(rest_logits, left > 0)[..., None]], -1)
    weights, lse = _softmax(logits)
    out = _mix(weights[..., :n], heads.v) + _mix(weights[..., n:-1], values) + weights[..., -1:] * rest_value
    return out, lse


def _stats(x: Tensor) -> torch.dtype:
    """Sums and softmax run in float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * (q @ k.transpose(-1, -2)).to(_stats(q))


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    return (weights.to(v.dtype) @ v).to(weights.dtype)


def _log(count: Tensor) -> Tensor:
    return count.clamp(min=1).log()


def _masked(logits: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, logits, -torch.inf)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its log-sum-exp; a row without entries gives zeros and -inf, gradients 0."""
    logits = logits.to(_stats(logits))
    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)
    exp = (logits - top).exp()
    total = exp.sum(-1, keepdim=True)
    some = total > 0
    lse = torch.where(some, torch.where(some, total, 1).log() + top, -torch.inf)
    return exp / torch.where(some, total, 1), lse.squeeze(-1)
