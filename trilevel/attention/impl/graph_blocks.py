"""Exported attention of rows of any length: the same blocks of queries and windows of keys as `blocked`.

Positions stay integers, so that a runtime that computes in bfloat16 counts right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilevel.attention.call import Call
from trilevel.attention.impl.graph_entries import chosen_tokens, hide, length_of, log_count, pooled, region_size


class Form:
    """The head classes of a call, each `(batch, heads, tokens, dim)` of queries, keys and values to outputs."""

    def __init__(self, call: Call) -> None:
        self._call, self._places = call, _Places.of(call)

    def local(self, q: Tensor, k: Tensor, v: Tensor, _weight: Tensor | None) -> Tensor:
        """Heads that see their window, sinks, and the mean of the rest."""
        return _local(self._call, self._places, _Part.of(self._call, self._places, q, k, v))

    def regional(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
        """Heads that see their window and summaries of regions."""
        return _regional(self._call, self._places, _Part.of(self._call, self._places, q, k, v), weight)

    def global_(self, q: Tensor, k: Tensor, v: Tensor, _weight: Tensor | None) -> Tensor:
        """Heads that see their window, the chosen tokens, and the mean of the rest."""
        return _global(self._call, self._places, _Part.of(self._call, self._places, q, k, v))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Integers and masks that all head classes share; (batch or 1, blocks, block, ...).

    length: real tokens of the row, (batch or 1, 1, 1, 1). low, high: near(i) as a half-open interval. near: 1 for the
    keys of its block's window that a query sees, else 0, as runtimes multiply many times faster than they choose.
    near_bias: the same as an addend. valid: (batch, tokens) or None.
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
        length = length_of(call)
        near = ((key - row).abs() <= radius) & (key >= 0) & (key < length)
        return _Places(
            tokens=tokens,
            block=block,
            blocks=blocks,
            steps=steps,
            length=length,
            low=(row - radius).clamp(min=0),
            high=torch.minimum(row + radius + 1, length),
            near=near.to(call.query.dtype)[:, None],
            near_bias=hide(near, call.query.dtype)[:, None],
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
        total = total - (part.raw * places.near).sum(-1, keepdim=True)
        if others is not None and held is not None:
            total = total - torch.where(held[:, None], others, 0).sum(-1, keepdim=True)
        count = places.rest(held)[:, None]
        rest = count.clamp(min=1).to(total.dtype)
        return _Remainder(
            logit=total / rest + log_count(count, total.dtype), rest=rest, value_sum=value.sum(2, keepdim=True)
        )

    def share(self, weight: Tensor) -> Tensor:
        """The weight of one of its tokens."""
        return weight / self.rest

    def add(self, share: Tensor) -> Tensor:
        """What all tokens of the row add at that weight; the other entries give theirs back."""
        return share * self.value_sum[:, :, None]


def _local(call: Call, places: _Places, part: _Part) -> Tensor:
    sinks, seen, held = None, None, None
    tails: list[Tensor] = []
    count = call.levels.num_sinks
    if count:
        index = torch.arange(count, device=part.key.device)
        held = ((index < places.low) | (index >= places.high)) & (index < places.length)
        # a row may be shorter than its sinks
        sinks = [pad(x, (0, 0, 0, count))[:, :, :count] for x in (part.key, part.value)]
        seen = part.all_blocks(sinks[0].transpose(-1, -2))
        tails.append(seen + hide(held, seen.dtype)[:, None])
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
    near = weights[0] - share * places.near
    added = [remainder.add(share)]
    if tail_value is not None and held is not None:
        added.append(part.spread(weights[1] - torch.where(held[:, None], share, 0), tail_value))
    return part.finish(places, near, added)


def _global(call: Call, places: _Places, part: _Part) -> Tensor:
    index = chosen_tokens(call)
    places_of = index[:, None, None, :]
    held = ((places_of < places.low) | (places_of >= places.high)) & (places_of < places.length)
    rows = index[:, None, :, None].expand(-1, part.key.shape[1], -1, part.key.shape[3])
    key, value = part.key.gather(2, rows), part.value.gather(2, rows)
    seen = part.all_blocks(key.transpose(-1, -2))
    remainder = _Remainder.of(places, part, seen, held)
    weights = part.attend(places, [seen + hide(held, seen.dtype)[:, None], remainder.logit])
    return _with_remainder(places, part, remainder, weights, value, held)


def _regional(call: Call, places: _Places, part: _Part, weight: Tensor | None) -> Tensor:
    key, value = pooled(call, part.key, part.value, weight)
    start = torch.arange(key.shape[2], device=key.device) * region_size(call)
    end = torch.minimum(start + region_size(call), places.length)
    near = (torch.minimum(end, places.high) - torch.maximum(start, places.low)).clamp(min=0)
    count = (end - start).clamp(min=0) - near
    seen = part.all_blocks(key.transpose(-1, -2))
    weights = part.attend(places, [seen + log_count(count, seen.dtype)[:, None]])
    return part.finish(places, weights[0], [part.spread(weights[1], value)])
