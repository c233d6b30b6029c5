"""What is exported: `calibrated` attention in operators that every runtime has (ONNX, OpenVINO, TensorRT).

The same blocks of queries and windows of keys as `blocked`, without what only torch can do: one sequence a row, real
tokens first, no data-dependent shapes, no gradient of the selection. Positions stay integers, so that a runtime that
computes in bfloat16 counts right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilevel.attention.call import Call
from trilevel.attention.levels import Levels
from trilevel.errors import ImplementationError

HIDDEN = -1e9
"""Added to a logit that counts for nothing; finite, as some runtimes make NaN of -inf."""


def obstacle(call: Call) -> str | None:
    """Why this call cannot be written in such a graph, None if it can."""
    reasons = {
        "causal attention": call.is_causal,
        "mode='strict'": call.levels.mode == "strict",
        "union=True": call.levels.union,
        "num_regions (use region_size)": call.levels.region_size is None and call.split.regional > 0,
        "segment_ids": call.segment is not None,
        "global_forced": call.forced is not None,
        "selection_gradient='gate'": call.levels.selection_gradient == "gate",
        "return_lse=True": call.needs_lse,
    }
    return next((name for name, is_given in reasons.items() if is_given), None)


def attend(call: Call) -> tuple[Tensor, None]:
    """Outputs (batch, heads, tokens, dim).

    Raises:
        ImplementationError: the call is none that can be exported, or padding stands before a real token.
    """
    missing = obstacle(call)
    if missing is not None:
        raise ImplementationError(f"impl='graph', what is exported, does not do {missing}. Use impl='auto'.")
    _check_padding(call)
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x if group == 1 else x.repeat_interleave(group, 1) for x in (call.key, call.value))
    weight = call.pool_weight
    if weight is not None and group > 1:
        weight = weight.repeat_interleave(group, 0)
    places = _Places.of(call)
    outs, start = [], 0
    for index, heads in enumerate(call.split):
        own = slice(start, start + heads)
        start += heads
        if heads:
            part = _Part.of(call, places, call.query[:, own], key[:, own], value[:, own])
            outs.append(_HEADS[index](call, places, part, None if weight is None else weight[own]))
    out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
    return _real_rows(out, call.valid), None


def dense(call: Call) -> Tensor:
    """Dense attention of the call over its real tokens; what is exported of `levels=None`."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = (x if group == 1 else x.repeat_interleave(group, 1) for x in (call.key, call.value))
    logits = (call.query * call.scale) @ key.transpose(-1, -2)
    if call.valid is not None:
        logits = logits + _hide(call.valid, logits.dtype)[:, None, None, :]
    return _real_rows(torch.softmax(logits, -1) @ value, call.valid)


def _real_rows(out: Tensor, valid: Tensor | None) -> Tensor:
    """0 in the rows of padding."""
    return out if valid is None else torch.where(valid[:, None, :, None], out, 0)


def _check_padding(call: Call) -> None:
    if call.valid is None or torch.compiler.is_compiling():
        return
    if (call.valid[:, 1:] & ~call.valid[:, :-1]).any():
        raise ImplementationError("impl='graph' needs the padding of every row behind its last real token.")


def _hide(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token is seen, `HIDDEN` elsewhere."""
    return torch.where(seen, 0.0, HIDDEN).to(dtype)


def _log(count: Tensor, dtype: torch.dtype) -> Tensor:
    """Logarithm of a number of tokens, `HIDDEN` of none."""
    return torch.where(count > 0, count.clamp(min=1).to(dtype).log(), HIDDEN).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Integers and masks that all head classes share; (batch or 1, blocks, block, ...).

    length: real tokens of the row, (batch or 1, 1, 1, 1). low, high: near(i) as a half-open interval. near: which keys
    of its block's window a query sees. near_bias: the same as an addend. valid: (batch, tokens) or None.
    """

    tokens: int
    block: int
    blocks: int
    steps: int
    length: Tensor
    low: Tensor
    high: Tensor
    near: Tensor
    near_bias: Tensor
    valid: Tensor | None

    @staticmethod
    def of(call: Call) -> _Places:
        tokens, radius = call.query.shape[2], call.levels.radius
        block = _block(radius)
        blocks, steps = (tokens + block - 1) // block, 1 + -(-2 * radius // block)
        device = call.query.device
        first = torch.arange(blocks, device=device)[None, :, None, None] * block
        row = first + torch.arange(block, device=device)[:, None]
        key = first + torch.arange(steps * block, device=device) - radius
        if call.valid is None:
            length = torch.full((1, 1, 1, 1), tokens, device=device)
        else:
            length = call.valid.long().sum(1)[:, None, None, None]
        near = ((key - row).abs() <= radius) & (key >= 0) & (key < length)
        return _Places(
            tokens=tokens,
            block=block,
            blocks=blocks,
            steps=steps,
            length=length,
            low=(row - radius).clamp(min=0),
            high=torch.minimum(row + radius + 1, length),
            near=near,
            near_bias=_hide(near, call.query.dtype)[:, None],
            valid=call.valid,
        )

    def rest(self, held: Tensor | None) -> Tensor:
        """How many real tokens are outside near(i) and not `held` otherwise (batch, blocks, block, 1)."""
        count = self.length - (self.high - self.low).clamp(min=0)
        return count if held is None else count - held.long().sum(-1, keepdim=True)


def _block(radius: int) -> int:
    """Queries in a block, so that its window is a few whole blocks."""
    return 32 if radius <= 32 else 64 if radius <= 128 else 128


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One head class: queries by block, keys and values by window, and the logits of the near window without bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    windows: Tensor
    raw: Tensor

    @staticmethod
    def of(call: Call, places: _Places, query: Tensor, key: Tensor, value: Tensor) -> _Part:
        batch, heads, _, dim = query.shape
        full = places.blocks * places.block
        padded = pad(query * call.scale, (0, 0, 0, full - places.tokens))
        blocked = padded.reshape(batch, heads, places.blocks, places.block, dim)
        radius = call.levels.radius
        return _Part(
            query=blocked,
            key=key,
            value=value,
            windows=_windows(value, places, radius),
            raw=blocked @ _windows(key, places, radius).transpose(-1, -2),
        )

    def attend(self, places: _Places, tails: list[Tensor]) -> list[Tensor]:
        """Weights of the near window and of each tail, by one softmax over all of them."""
        parts = [self.raw + places.near_bias, *tails]
        weights = torch.softmax(torch.cat(parts, -1), -1)
        return list(weights.split([part.shape[-1] for part in parts], -1))

    def finish(self, places: _Places, near: Tensor, tails: list[Tensor]) -> Tensor:
        """Weighted values as (batch, heads, tokens, dim)."""
        out = near @ self.windows
        for tail in tails:
            out = out + tail
        batch, heads, _, dim = self.key.shape
        rows = out.reshape(batch, heads, places.blocks * places.block, dim)
        # a traced slice is asked whether it is contiguous, which would tie the graph to lengths that fill no block
        return rows.index_select(2, torch.arange(places.tokens, device=rows.device))

    def all_blocks(self, x: Tensor) -> Tensor:
        """Queries times x (batch, heads, dim, entries): (batch, heads, blocks, block, entries)."""
        batch, heads, blocks, block, dim = self.query.shape
        return (self.query.reshape(batch, heads, blocks * block, dim) @ x).view(
            batch, heads, blocks, block, x.shape[-1]
        )

    def spread(self, weights: Tensor, x: Tensor) -> Tensor:
        """Weights times x (batch, heads, entries, dim), by block."""
        batch, heads, blocks, block, entries = weights.shape
        return (weights.reshape(batch, heads, blocks * block, entries) @ x).view(
            batch, heads, blocks, block, x.shape[-1]
        )


def _windows(x: Tensor, places: _Places, radius: int) -> Tensor:
    """Tokens around every block, (batch, heads, blocks, steps * block, dim); 0 outside the row."""
    batch, heads, tokens, dim = x.shape
    count = places.blocks + places.steps - 1
    padded = pad(x, (0, 0, radius, count * places.block - tokens - radius))
    cut = padded.reshape(batch, heads, count, places.block, dim)
    return torch.cat([cut[:, :, step : step + places.blocks] for step in range(places.steps)], 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remainder:
    """The plain mean of the tokens in no other entry: its logit, and what its weight adds."""

    logit: Tensor
    rest: Tensor
    value_sum: Tensor

    @staticmethod
    def of(places: _Places, part: _Part, others: Tensor | None, held: Tensor | None) -> _Remainder:
        """`others` are logits (batch, heads, blocks, block, p) of further entries, `held` which of them count."""
        key, value = part.key, part.value
        if places.valid is not None:
            real = places.valid[:, None, :, None]
            key, value = torch.where(real, key, 0), torch.where(real, value, 0)
        total = part.all_blocks(key.sum(2)[..., None])
        total = total - torch.where(places.near[:, None], part.raw, 0).sum(-1, keepdim=True)
        if others is not None and held is not None:
            total = total - torch.where(held[:, None], others, 0).sum(-1, keepdim=True)
        count = places.rest(held)[:, None]
        rest = count.clamp(min=1).to(total.dtype)
        return _Remainder(
            logit=total / rest + _log(count, total.dtype), rest=rest, value_sum=value.sum(2, keepdim=True)
        )

    def share(self, weight: Tensor) -> Tensor:
        """The weight of one of its tokens."""
        return weight / self.rest

    def add(self, share: Tensor) -> Tensor:
        """What all tokens of the row add at that weight; the other entries give theirs back."""
        return share * self.value_sum[:, :, None]


def _local(call: Call, places: _Places, part: _Part, _weight: Tensor | None) -> Tensor:
    sinks, seen, held = None, None, None
    tails: list[Tensor] = []
    count = call.levels.num_sinks
    if count:
        index = torch.arange(count, device=part.key.device)
        held = ((index < places.low) | (index >= places.high)) & (index < places.length)
        # a row may be shorter than its sinks
        sinks = [pad(x, (0, 0, 0, count))[:, :, :count] for x in (part.key, part.value)]
        seen = part.all_blocks(sinks[0].transpose(-1, -2))
        tails.append(seen + _hide(held, seen.dtype)[:, None])
    remainder = _Remainder.of(places, part, seen, held)
    weights = part.attend(places, [*tails, remainder.logit])
    return _with_remainder(places, part, remainder, weights, None if sinks is None else sinks[1], held)


def _with_remainder(
    places: _Places,
    part: _Part,
    remainder: _Remainder,
    weights: list[Tensor],
    tail_value: Tensor | None,
    held: Tensor | None,
) -> Tensor:
    """The sums of the remainder hold every token; the entries that stand for themselves get less by its share."""
    share = remainder.share(weights[-1])
    near = weights[0] - torch.where(places.near[:, None], share, 0)
    added = [remainder.add(share)]
    if tail_value is not None and held is not None:
        added.append(part.spread(weights[1] - torch.where(held[:, None], share, 0), tail_value))
    return part.finish(places, near, added)


def _global(call: Call, places: _Places, part: _Part, _weight: Tensor | None) -> Tensor:
    index = _chosen(call, places)
    places_of = index[:, None, None, :]
    held = ((places_of < places.low) | (places_of >= places.high)) & (places_of < places.length)
    rows = index[:, None, :, None].expand(-1, part.key.shape[1], -1, part.key.shape[3])
    key, value = part.key.gather(2, rows), part.value.gather(2, rows)
    seen = part.all_blocks(key.transpose(-1, -2))
    remainder = _Remainder.of(places, part, seen, held)
    weights = part.attend(places, [seen + _hide(held, seen.dtype)[:, None], remainder.logit])
    return _with_remainder(places, part, remainder, weights, value, held)


def _chosen(call: Call, places: _Places) -> Tensor:
    """Positions of the global tokens, (batch, p); of equal scores the earlier ones."""
    batch = call.query.shape[0]
    score = call.query.new_zeros(batch, places.tokens) if call.score is None else call.score.detach()
    if places.valid is not None:
        score = torch.where(places.valid, score, HIDDEN)
    count = call.levels.num_global_tokens
    most = min(count, places.tokens) if isinstance(places.tokens, int) else torch.sym_min(count, places.tokens)
    if torch.compiler.is_exporting():
        return first_of_best(score, most)
    return torch.sort(score, dim=1, descending=True, stable=True).indices[:, :most]


def first_of_best(score: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of each row, of equal ones the earlier; (batch, tokens) to (batch, count).

    In the first layer a token scores the same wherever it stands, and of equal scores OpenVINO's TopK takes any. So the
    least score is looked up, and positions, which all differ, are chosen.
    """
    least = torch.topk(score, count, dim=1).values[:, -1:]
    tokens = score.shape[1]
    place = torch.arange(tokens, device=score.device)
    rank = torch.where(score > least, 2 * tokens, torch.where(score == least, tokens, 0)) - place
    return torch.topk(rank, count, dim=1).indices


def _regional(call: Call, places: _Places, part: _Part, weight: Tensor | None) -> Tensor:
    levels = call.levels
    key, value = _pooled(levels, places, part, weight)
    start = torch.arange(key.shape[2], device=key.device) * _size(levels)
    end = torch.minimum(start + _size(levels), places.length)
    near = (torch.minimum(end, places.high) - torch.maximum(start, places.low)).clamp(min=0)
    count = (end - start).clamp(min=0) - near
    seen = part.all_blocks(key.transpose(-1, -2))
    weights = part.attend(places, [seen + _log(count, seen.dtype)[:, None]])
    return part.finish(places, weights[0], [part.spread(weights[1], value)])


def _size(levels: Levels) -> int:
    assert levels.region_size is not None
    return levels.region_size


def _pooled(levels: Levels, places: _Places, part: _Part, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """A summary a region, keys and values (batch, heads, regions, dim); that of an empty region means nothing."""
    batch, heads, tokens, dim = part.key.shape
    size = _size(levels)
    regions = (tokens + size - 1) // size
    key, value = (
        pad(x, (0, 0, 0, regions * size - tokens)).reshape(batch, heads, regions, size, dim)
        for x in (part.key, part.value)
    )
    position = torch.arange(regions * size, device=key.device).view(1, 1, regions, size)
    bias = _hide(position < places.length, key.dtype)
    logit = bias.expand(batch, heads, -1, -1) if weight is None else (key * weight[:, None, None, :]).sum(-1) + bias
    share = torch.softmax(logit, -1)[..., None, :]
    return (share @ key).squeeze(-2), (share @ value).squeeze(-2)


_HEADS = (_local, _regional, _global)
