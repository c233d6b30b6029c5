"""Portable implementation: batched matrix products over blocks of queries and strided windows of keys.

Memory and time are O(tokens * (window + tail)). Without gradients, long inputs are streamed head by head and block by
block, so that the logits of one step stay in cache and the peak does not grow with the heads.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from trilevel.attention.call import Call, empty_output
from trilevel.attention.entries import Entries, Remainder, global_entries, local_entries, regional_entries
from trilevel.attention.finite import hide_nonfinite
from trilevel.attention.geometry import Geometry, make_geometry
from trilevel.attention.memory import with_huge_pages
from trilevel.attention.near import near_attention
from trilevel.attention.rows import Rows, SeenTail, View, compute_dtype, view_of, window_width, windows
from trilevel.attention.strict import strict_global, strict_regional

# logits of one streamed step: 1 MiB of float32, what a second-level cache holds
STEP_LOGITS = 256 * 1024


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """Outputs (batch, heads, tokens, dim) and, if the call needs it, log-sum-exp (batch, heads, tokens)."""
    geometry = make_geometry(
        call.query.shape[2],
        radius=call.levels.radius,
        valid=call.valid,
        segment=call.segment,
        num_segments=call.num_segments,
        is_causal=call.is_causal,
        device=call.query.device,
    )
    call, seen = hide_nonfinite(call, geometry)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        parts = [_head_class(call, geometry, index, None) for index, heads in enumerate(call.split) if heads]
        out = torch.cat([part[0] for part in parts], 1)
    else:
        out = with_huge_pages(empty_output(call.query))
        pieces = out.split(list(call.split), 1)
        parts = [_head_class(call, geometry, index, into) for index, into in enumerate(pieces) if into.shape[1]]
    if call.valid is not None:
        out = torch.where(call.valid[:, None, :, None], out, 0)
    if seen is not None:
        out = torch.where(seen[:, None, :, None], torch.nan, out)
    if not call.needs_lse:
        return out, None
    lse = torch.cat([part[1] for part in parts], 1)
    if call.valid is not None:
        lse = torch.where(call.valid[:, None], lse, -torch.inf)
    return out, lse if seen is None else torch.where(seen[:, None], torch.nan, lse)


def _head_class(call: Call, geometry: Geometry, index: int, into: Tensor | None) -> tuple[Tensor, Tensor]:
    """Heads of one class (0 local, 1 regional, 2 global); without gradients their output is written to `into`."""
    group = call.query.shape[1] // call.key.shape[1]
    start = sum(call.split[:index])
    stop = start + call.split[index]
    q = call.query[:, start:stop]
    k, v = (x[:, start // group : stop // group] for x in (call.key, call.value))
    weight = None if call.pool_weight is None else call.pool_weight[start // group : stop // group]
    if call.levels.mode == "strict" and index > 0:
        q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
        if index == 1:
            out, lse = strict_regional(call, geometry, q, k, v, weight)
        else:
            out, lse = strict_global(call, geometry, q, k, v)
    else:
        entries = _entries(call, geometry, index, k, v, weight)
        if into is not None and _is_near_alone(call, q):
            return near_attention(call, geometry, q, k, v, _block(call), into), into.new_zeros(())
        if into is not None and _is_long(call, q, entries):
            return into, _stream(call, geometry, q, k, v, entries, into)
        rows = Rows.all(q.shape[2], _block(call))
        out, lse = _attend_rows(call, q, k, v, entries, view_of(call, geometry, entries, rows))
    return (out.to(call.query.dtype), lse) if into is None else (into.copy_(out), lse)


def _entries(call: Call, geometry: Geometry, index: int, k: Tensor, v: Tensor, weight: Tensor | None) -> Entries:
    if call.levels.mode == "strict":
        return Entries()
    if index == 0:
        return local_entries(call, geometry, k, v)
    return (regional_entries if index == 1 else global_entries)(call, geometry, k, v, weight)


def _block(call: Call) -> int:
    """Queries in a block: as many as keep most of a window's keys in use."""
    radius = call.levels.radius
    return 32 if radius <= 32 else 64 if radius <= 128 else 128


def _entries_per_query(call: Call, entries: Entries) -> int:
    return window_width(call.levels.radius, call.is_causal, _block(call)) + _tail_width(entries)


def _is_near_alone(call: Call, q: Tensor) -> bool:
    """Whether the fused kernel computes these heads, once they are known not to be strict regional or global ones."""
    return call.levels.mode == "strict" and not call.needs_lse and q.device.type == "cpu"


def _is_long(call: Call, q: Tensor, entries: Entries) -> bool:
    return q.shape[0] * q.shape[1] * q.shape[2] * _entries_per_query(call, entries) > STEP_LOGITS


def _stream(call: Call, geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, entries: Entries, into: Tensor) -> Tensor:
    """Row by row of the batch, run by run of blocks, group by group of heads; outputs to `into`, returns the LSE."""
    batch, heads, tokens, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=compute_dtype(q))
    groups, block = k.shape[1], _block(call)
    per_group = heads // groups
    step = block * max(1, STEP_LOGITS // (per_group * block * _entries_per_query(call, entries)))
    for row in range(batch):
        own = _part(geometry, row, 0)
        parts = [_part(entries, row, group) for group in range(groups)]
        for start in range(0, tokens, step):
            stop = min(tokens, start + step)
            view = view_of(call, own, parts[0], Rows.part(start, stop, block))
            for group, part in enumerate(parts):
                span = slice(group * per_group, (group + 1) * per_group)
                own_k, own_v = (x[row : row + 1, group : group + 1] for x in (k, v))
                got = _attend_rows(call, q[row : row + 1, span], own_k, own_v, part, view)
                into[row : row + 1, span, start:stop] = got[0]
                lse[row : row + 1, span, start:stop] = got[1]
    return lse


def _attend_rows(call: Call, q: Tensor, k: Tensor, v: Tensor, entries: Entries, view: View) -> tuple[Tensor, Tensor]:
    """Queries of the view's rows against everything they see; q, k and v are whole rows."""
    rows = view.rows
    batch, heads, _, dim = q.shape
    groups, length = k.shape[1], rows.stop - rows.start
    queries = rows.vectors(q).to(compute_dtype(q)) * call.scale
    queries = queries.view(batch, groups, heads // groups, rows.num_blocks, rows.block, dim).transpose(2, 3)
    k_near, v_near = (windows(x, rows, call.levels.radius, call.is_causal, dtype=queries.dtype) for x in (k, v))
    raw = _blockwise(queries, k_near.transpose(-1, -2))
    parts = [raw + view.near_bias]
    tail = None if view.tail is None else _TailRead(view.tail, queries, k, v)
    if tail is not None:
        parts.append(tail.raw + tail.seen.bias)
    if entries.regions is not None:
        parts.append(_shared(queries, entries.regions.key.transpose(-1, -2)) + view.region_bias)
    if entries.remainder is not None:
        parts.append(_remainder_logit(entries.remainder, view, queries, raw, tail))
    logits = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    shares = list(torch.softmax(logits, -1).split([part.shape[-1] for part in parts], -1))
    rest = None if entries.remainder is None else shares.pop() / view.rest_count
    out = _blockwise(_less(shares.pop(0), rest, view.near_held), v_near)
    if tail is not None:
        out = out + tail.read(_less(shares.pop(0), rest, tail.seen.held))
    if entries.regions is not None:
        out = out + _shared(shares.pop(0), entries.regions.value)
    if entries.remainder is not None and rest is not None:
        out = torch.addcmul(out, rest, _sums(entries.remainder.value_sum, rows))
    out = _first(out.transpose(2, 3).reshape(batch, heads, rows.num_blocks * rows.block, dim), length)
    if not call.needs_lse:
        return out, out.new_zeros(())
    return out, _first(logits.logsumexp(-1).transpose(2, 3).reshape(batch, heads, -1), length)


def _first(x: Tensor, length: int) -> Tensor:
    """Drop the rows that fill the last block."""
    if torch.compiler.is_compiling():
        # a traced slice is asked whether it is contiguous, which would tie the graph to lengths that fill no block
        return x.index_select(2, torch.arange(length, device=x.device))
    return x[:, :, :length]


def _less(share: Tensor, rest: Tensor | None, held: Tensor | None) -> Tensor:
    """Weights of tokens that the sums of the remainder hold as well, which gives each of them `rest` too much."""
    return share if rest is None or held is None else torch.addcmul(share, rest, held, value=-1)


class _TailRead:
    """Logits of the token tail and the weighted read of its values, for tokens shared by all queries or one's own."""

    def __init__(self, seen: SeenTail, queries: Tensor, k: Tensor, v: Tensor) -> None:
        batch, groups, blocks, _, block, dim = queries.shape
        pick = seen.pick
        self.seen, self.per_query = seen, pick.ndim == 3
        keys, self.value = (_rows_at(x, pick.flatten(1)).to(queries.dtype) for x in (k, v))
        if not self.per_query:
            self.raw = _shared(queries, keys.transpose(-1, -2))
            return
        shape = (batch, groups, blocks, block, pick.shape[2], dim)
        keys, self.value = keys.view(shape), self.value.view(shape)
        # one small product a query: rows of the group's heads against the query's own keys
        self.raw = (queries.transpose(3, 4) @ keys.transpose(-1, -2)).transpose(3, 4)

    def read(self, weight: Tensor) -> Tensor:
        """Weighted values, (batch, groups, blocks, heads per group, block, dim)."""
        if not self.per_query:
            return _shared(weight, self.value)
        return (weight.transpose(3, 4) @ self.value).transpose(3, 4)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of (batch, heads, tokens, dim) at (batch, count) positions."""
    batch, heads, _, dim = x.shape
    if isinstance(batch, int) and batch == 1:
        # copies whole rows, many times faster than a gather by element
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None, :, None].expand(batch, heads, -1, dim))


def _tail_width(entries: Entries) -> int:
    tokens = 0 if entries.tokens is None else entries.tokens.index.shape[-1]
    regions = 0 if entries.regions is None else entries.regions.key.shape[2]
    return tokens + regions + 1


def _blockwise(x: Tensor, y: Tensor) -> Tensor:
    """Product a block: x (batch, groups, blocks, heads, block, a), y (batch, groups, blocks, a, b)."""
    batch, groups, blocks, heads, block, inner = x.shape
    product = torch.bmm(
        x.reshape(batch * groups * blocks, heads * block, inner), y.reshape(batch * groups * blocks, inner, y.shape[-1])
    )
    return product.view(batch, groups, blocks, heads, block, y.shape[-1])


def _shared(x: Tensor, y: Tensor) -> Tensor:
    """Product with what all blocks share: x (batch, groups, blocks, heads, block, a), y (batch, groups, a, b)."""
    batch, groups, blocks, heads, block, inner = x.shape
    product = torch.bmm(
        x.reshape(batch * groups, blocks * heads * block, inner), y.reshape(batch * groups, inner, y.shape[-1])
    )
    return product.view(batch, groups, blocks, heads, block, y.shape[-1])


def _remainder_logit(remainder: Remainder, view: View, queries: Tensor, raw: Tensor, tail: _TailRead | None) -> Tensor:
    """Mean logit of the tokens of the remainder plus log count, -inf for none."""
    if remainder.key_sum.shape[2] == 1:
        total = _shared(queries, remainder.key_sum.transpose(-1, -2))
    else:
        total = (queries * view.rows.vectors(remainder.key_sum)).sum(-1, keepdim=True)
    if view.near_held is not None:
        total = total - (raw * view.near_held).sum(-1, keepdim=True)
    if tail is not None:
        total = total - (tail.raw * tail.seen.held).sum(-1, keepdim=True)
    return total / view.rest_count + view.rest_bias


def _sums(x: Tensor, rows: Rows) -> Tensor:
    """Sums of the remainder for these rows, (batch, groups, blocks or 1, 1, block or 1, dim)."""
    return x[:, :, :, None, None] if x.shape[2] == 1 else rows.vectors(x)


Part = TypeVar("Part", Geometry, Entries)


def _part(whole: Part, row: int, group: int) -> Part:
    """One row of the batch and, in (batch, kv_heads, tokens, dim) tensors, one KV group of it."""

    def cut(x: Any) -> Any:
        if is_dataclass(x) and not isinstance(x, type):
            return replace(x, **{field.name: cut(getattr(x, field.name)) for field in fields(x) if field.init})
        if not isinstance(x, Tensor):
            return x
        own = x if x.shape[0] == 1 else x[row : row + 1]
        return own[:, group : group + 1] if x.ndim == 4 else own

    part: Part = cut(whole)
    return part
