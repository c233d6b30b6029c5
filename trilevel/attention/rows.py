"""What a run of query rows sees: masks, log-counts and windows of its blocks, the same for all heads of a class.

Sizes are O(rows * (window + tail)); no tensor is tokens x tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilevel.attention.call import Call
from trilevel.attention.entries import Entries, RegionTail, TokenTail
from trilevel.attention.geometry import Geometry


@dataclass(frozen=True, slots=True)
class Rows:
    """A run of query rows in blocks; per-row tensors are (batch or 1, 1, blocks, 1, block, 1).

    `whole`: the run is the row. A traced length is then never compared with another, so that one graph serves all.
    """

    start: int
    stop: int
    block: int
    num_blocks: int
    whole: bool

    @staticmethod
    def all(tokens: int, block: int) -> Rows:
        """The whole row."""
        return Rows(0, tokens, block, (tokens + block - 1) // block, whole=True)

    @staticmethod
    def part(start: int, stop: int, block: int) -> Rows:
        """Rows `start` to `stop`."""
        return Rows(start, stop, block, (stop - start + block - 1) // block, whole=False)

    def of(self, x: Tensor) -> Tensor:
        """Cut (batch or 1, tokens) to these rows, padded with 0."""
        own = x if self.whole else x[:, self.start : self.stop]
        rows = pad(own, (0, self.num_blocks * self.block - (self.stop - self.start)))
        return rows.view(x.shape[0], 1, self.num_blocks, 1, self.block, 1)

    def vectors(self, x: Tensor) -> Tensor:
        """Cut (batch, heads, tokens, dim) to (batch, heads, blocks, 1, block, dim), padded with 0."""
        batch, heads, _, dim = x.shape
        spare = self.num_blocks * self.block - (self.stop - self.start)
        rows = pad(x, (0, 0, 0, spare)) if self.whole else _padded(x[:, :, self.start : self.stop], 0, spare)
        return rows.reshape(batch, heads, self.num_blocks, 1, self.block, dim)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Logits, softmax and sums run in float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenTail:
    """The token tail as a run of rows sees it.

    pick: positions, (batch, tail) shared by all queries or (batch, rows, p) of each one. bias: c_j, -inf where a token
    is not seen. held: 1 where the sums of the remainder hold the token as well.
    """

    pick: Tensor
    bias: Tensor
    held: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a run of rows sees, the same for all heads of a class; (batch or 1, 1, blocks, 1, block, entries).

    near_bias, region_bias: added to the logits. near_held: 1 where the sums of the remainder hold the token as well,
    None where they hold none. rest_count, rest_bias: tokens of the remainder (at least 1), log of their true number.
    """

    rows: Rows
    near_bias: Tensor
    near_held: Tensor | None
    tail: SeenTail | None
    region_bias: Tensor
    rest_count: Tensor
    rest_bias: Tensor


def view_of(call: Call, geometry: Geometry, entries: Entries, rows: Rows) -> View:
    """What `rows` see of the near window and the entries."""
    dtype = compute_dtype(call.query)
    low, high = rows.of(geometry.low), rows.of(geometry.high)
    near = near_mask(geometry, rows, call.levels.radius, call.is_causal)
    tail = None if entries.tokens is None else _tail_view(entries.tokens, geometry, rows, low, high, call.is_causal)
    remainder, regions = entries.remainder, entries.regions
    rest = torch.zeros_like(low) if remainder is None else rows.of(remainder.count)
    held = None
    if remainder is not None and remainder.holds_near:
        rest = rest - (high - low)
    if remainder is not None and tail is not None:
        held = tail.outside & (tail.rank >= rows.of(remainder.start))
        rest = rest - held.sum(-1, keepdim=True)
    in_regions = (
        torch.zeros_like(low) if regions is None else _region_count(call, geometry, regions, rows, low, high, tail)
    )
    # log(0) = -inf drops an entry, forward and backward
    return View(
        rows=rows,
        near_bias=torch.zeros_like(near, dtype=dtype).masked_fill(~near, -torch.inf),
        near_held=near.to(dtype) if remainder is not None and remainder.holds_near else None,
        tail=None if tail is None else tail.seen(held, dtype),
        region_bias=in_regions.to(dtype).log_(),
        rest_count=rest.clamp(min=1).to(dtype),
        rest_bias=rest.clamp(min=0).to(dtype).log(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _TailView:
    """The token tail as a run of rows sees it: ranks, positions, and which are visible outside the near window."""

    rank: Tensor
    pick: Tensor
    outside: Tensor
    c: Tensor | None

    def seen(self, held: Tensor | None, dtype: torch.dtype) -> SeenTail:
        """Biases and what the remainder (`held`, None for no remainder) has to give back."""
        c = torch.zeros((), dtype=dtype, device=self.rank.device) if self.c is None else self.c.to(dtype)
        given_back = torch.zeros_like(self.outside) if held is None else held
        return SeenTail(pick=self.pick, bias=torch.where(self.outside, c, -torch.inf), held=given_back.to(dtype))


def _tail_view(
    tail: TokenTail, geometry: Geometry, rows: Rows, low: Tensor, high: Tensor, is_causal: bool
) -> _TailView:
    batch = tail.index.shape[0]
    fields = [tail.rank, tail.segment, tail.valid] + ([] if tail.bias is None else [tail.bias])
    if tail.set_of_token is None:
        pick = tail.index
        own = [x.view(batch, 1, 1, 1, 1, -1) for x in fields]
    else:
        chosen = rows.of(tail.set_of_token + 1).flatten(1).expand(batch, -1) - 1
        place = chosen.clamp(min=0)[..., None].expand(-1, -1, tail.index.shape[2])
        shape = (batch, 1, rows.num_blocks, 1, rows.block, -1)
        pick = tail.index.gather(1, place)
        own = [x.gather(1, place).view(shape) for x in fields]
        own[2] = own[2] & (chosen >= 0).view(shape)
    # causal: what is not before the window is in it or in the future (sinks)
    beyond = own[0] < low if is_causal else (own[0] < low) | (own[0] >= high)
    outside = own[2] & (own[1] == rows.of(geometry.segment)) & beyond
    return _TailView(rank=own[0], pick=pick, outside=outside, c=own[3] if len(own) > 3 else None)


def near_mask(geometry: Geometry, rows: Rows, radius: int, is_causal: bool) -> Tensor:
    """(batch or 1, 1, blocks, 1, block, width): keys of the window that are in near(i); a query always sees itself."""
    rank = geometry.rank if geometry.valid is None else torch.where(geometry.valid, geometry.rank, -1)
    keys = windows(rank[:, None, :, None], rows, radius, is_causal, fill=-1)
    keys = keys.view(rank.shape[0], 1, rows.num_blocks, 1, 1, window_width(radius, is_causal, rows.block))
    place = torch.arange(keys.shape[-1], device=rank.device)
    own = place == torch.arange(rows.block, device=rank.device)[:, None] + radius
    return ((keys >= rows.of(geometry.low)) & (keys < rows.of(geometry.high))) | own


def window_width(radius: int, is_causal: bool, block: int) -> int:
    """Keys in a block's window, a multiple of the block."""
    reach = radius if is_causal else 2 * radius
    return block * (1 + (reach + block - 1) // block)


def windows(
    x: Tensor, rows: Rows, radius: int, is_causal: bool, fill: float = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """Keys around every block of `rows`: (batch, heads, blocks, width, dim), `fill` outside the row.

    Place t of block b is token `rows.start + b * block + t - radius`.
    """
    batch, heads, tokens, dim = x.shape
    dtype = x.dtype if dtype is None else dtype
    block, blocks = rows.block, rows.num_blocks
    width = window_width(radius, is_causal, block)
    first, last = rows.start - radius, rows.start - radius + (blocks - 1) * block + width
    if rows.whole:
        # the last window always reaches the end of the row
        padded = pad(x, (0, 0, radius, last - tokens), value=fill).to(dtype)
    else:
        part = x[:, :, max(first, 0) : min(last, tokens)]
        # converted before windows overlap, so once
        padded = _padded(part.to(dtype), max(-first, 0), max(last - tokens, 0), fill)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and (batch * heads == 1 or not rows.whole):
        # a view with overlapping rows, which products read without a copy
        return padded.unfold(2, width, block).transpose(-1, -2)
    cut = padded.view(batch, heads, blocks + width // block - 1, block, dim)
    pieces = [cut[:, :, step : step + blocks] for step in range(width // block)]
    return torch.cat(pieces, 3)


def _padded(x: Tensor, before: int, after: int, fill: float = 0) -> Tensor:
    """More tokens of `fill` around (batch, heads, tokens, dim); `pad` copies even where it adds none."""
    return pad(x, (0, 0, before, after), value=fill) if before or after else x


def _region_count(
    call: Call,
    geometry: Geometry,
    regions: RegionTail,
    rows: Rows,
    low: Tensor,
    high: Tensor,
    tail: _TailView | None,
) -> Tensor:
    """Tokens of every region that are visible and in no other entry, as floats, which count exactly to 2**24."""
    slots, dtype = regions.slots, compute_dtype(call.query)
    start, end, segment, full = (
        x.view(x.shape[0], 1, 1, 1, 1, -1) for x in (slots.start, slots.end, slots.segment, slots.full)
    )
    near = torch.minimum(end.to(dtype), high.to(dtype)) - torch.maximum(start.to(dtype), low.to(dtype))
    count = (end - start).to(dtype) - near.clamp_(min=0)
    if tail is not None:
        inside = (tail.rank[..., None] >= start[..., None, :]) & (tail.rank[..., None] < end[..., None, :])
        count = count - (tail.outside.to(dtype)[..., None, :] @ inside.to(dtype)).squeeze(-2)
    if call.segment is not None:
        count = torch.where(segment == rows.of(geometry.segment), count, 0)
    if call.is_causal:
        count = torch.where(full & (end <= rows.of(geometry.rank) + 1), count, 0)
    return count
