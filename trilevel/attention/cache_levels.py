"""What a decode cache keeps of the past for the heads of one class, and the entries it makes of it.

Keys and values move together, as one tensor (2, batch, kv_heads, tokens, dim). Positions are plain integers, the same
for every row: there is neither padding nor a second segment. Sums are float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Tokens that arrive, one (a step) or many (a prompt).

    pair: (2, batch, kv_heads, tokens, dim) keys and values. leaving: (2, batch, kv_heads, dim), the token that the
    step pushes out of the window, None when there is none or for a prompt. pool_logit: (batch, kv_heads, tokens),
    u_h . k_j. strength, bias: (batch, tokens), what global tokens are selected by, and c_j. position: of the first one.
    """

    pair: Tensor
    leaving: Tensor | None
    pool_logit: Tensor
    strength: Tensor
    bias: Tensor
    position: int

    def of_heads(self, heads: slice) -> Arrival:
        """The same for some of the KV heads."""
        leaving = None if self.leaving is None else self.leaving[:, :, heads]
        return replace(self, pair=self.pair[:, :, heads], leaving=leaving, pool_logit=self.pool_logit[:, heads])


@dataclass(frozen=True, slots=True)
class Part:
    """Some entries: pair (2, batch, kv_heads, entries, dim) and bias, broadcastable to (batch, 1, 1, entries)."""

    pair: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Sizes and type of a state: (batch, kv_heads, dim), dtype of tokens, dtype of sums, radius `w` of the window."""

    batch: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    sum_dtype: torch.dtype
    device: torch.device
    radius: int

    def zeros(self) -> Tensor:
        """An empty sum of keys and values, (2, batch, kv_heads, dim)."""
        return torch.zeros(2, self.batch, self.kv_heads, self.dim, dtype=self.sum_dtype, device=self.device)

    def tokens(self, count: int) -> Tensor:
        """Room for `count` tokens, (2, batch, kv_heads, count, dim)."""
        return torch.zeros(2, self.batch, self.kv_heads, count, self.dim, dtype=self.dtype, device=self.device)

    def low(self, tokens: int) -> int:
        """First position of the window of the last of `tokens` tokens."""
        return max(tokens - 1 - self.radius, 0)


class LevelState(Protocol):
    """The past of one head class beyond the window."""

    def push(self, arrival: Arrival) -> None:
        """Take the next token in."""

    def fill(self, arrival: Arrival) -> None:
        """Take a prompt in, into an empty state."""

    def parts(self, tokens: int) -> list[Part]:
        """The entries beyond the window of the last of `tokens` tokens."""

    def tensors(self) -> Iterator[Tensor]:
        """All that is stored."""


class Window:
    """The last `w + 1` keys and values of all heads, a ring."""

    def __init__(self, room: Room) -> None:
        self._ring = room.tokens(room.radius + 1)

    def push(self, pair: Tensor, position: int) -> Tensor | None:
        """Take a token in, (2, batch, kv_heads, 1, dim); returns the one it replaces."""
        size = self._ring.shape[3]
        place = self._ring[..., position % size, :]
        leaving = place.clone() if position >= size else None
        place.copy_(pair[..., 0, :])
        return leaving

    def fill(self, pair: Tensor) -> None:
        """Keep the last tokens of a prompt."""
        tokens, size = pair.shape[3], self._ring.shape[3]
        places = torch.arange(max(tokens - size, 0), tokens, device=pair.device) % size
        self._ring[..., places, :] = pair[..., -size:, :]

    def part(self, tokens: int) -> Part:
        """near(i) of the last of `tokens` tokens; the order of entries does not matter."""
        return Part(self._ring[..., :tokens, :])

    def tensors(self) -> Iterator[Tensor]:
        """The ring."""
        yield self._ring


class RunningSum:
    """A sum of many terms, compensated: its error does not grow with their number (Kahan 1965)."""

    def __init__(self, total: Tensor) -> None:
        self.total, self._lost = total, torch.zeros_like(total)

    def add(self, term: Tensor) -> None:
        """Add a term, of any precision."""
        term = term.to(self.total.dtype) - self._lost
        total = self.total + term
        # what the rounding of the sum took away
        self._lost = (total - self.total) - term
        self.total = total

    def tensors(self) -> Iterator[Tensor]:
        """The sum and its compensation."""
        yield from (self.total, self._lost)


class LocalState:
    """Sinks and the plain sum of all other tokens before the window."""

    def __init__(self, room: Room, *, num_sinks: int) -> None:
        self._room, self._num_sinks = room, num_sinks
        self._sinks = room.tokens(0)
        self._rest = RunningSum(room.zeros())

    def push(self, arrival: Arrival) -> None:
        """Take the next token in."""
        if arrival.position < self._num_sinks:
            self._sinks = torch.cat([self._sinks, arrival.pair], 3)
        if arrival.leaving is not None and arrival.position - self._room.radius - 1 >= self._num_sinks:
            self._rest.add(arrival.leaving)

    def fill(self, arrival: Arrival) -> None:
        """Take a prompt in."""
        low = self._room.low(arrival.pair.shape[3])
        self._sinks = arrival.pair[..., : self._num_sinks, :].clone()
        self._rest = RunningSum(arrival.pair[..., self._num_sinks : low, :].sum(3, dtype=self._room.sum_dtype))

    def parts(self, tokens: int) -> list[Part]:
        """Sinks outside the window and the remainder."""
        low = self._room.low(tokens)
        outside = min(self._num_sinks, low)
        parts = [Part(self._sinks[..., :outside, :])] if outside else []
        return parts + ([_mean_of(self._rest.total, low - outside)] if low > outside else [])

    def tensors(self) -> Iterator[Tensor]:
        """Sinks and sums."""
        yield self._sinks
        yield from self._rest.tensors()


class RegionalState:
    """Summaries of the complete regions; of the open one the running softmax pooling and the plain sum.

    The pooling of the open region is an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867): the highest
    logit so far, and mass and weighted sums relative to it. The plain sum holds its tokens that left the window.
    """

    def __init__(self, room: Room, *, size: int) -> None:
        self._room, self._size = room, size
        self.num_closed = 0
        self._closed = room.tokens(0).to(room.sum_dtype)
        self._open_region()

    def _open_region(self) -> None:
        room = self._room
        self._mix, self.rest = room.zeros(), room.zeros()
        self._mass = torch.zeros_like(self._mix[0, ..., 0])
        self._highest = torch.full_like(self._mass, -torch.inf)

    def push(self, arrival: Arrival) -> None:
        """Take the next token in; the last one of a region closes it."""
        logit = arrival.pool_logit[..., 0]
        highest = torch.maximum(self._highest, logit)
        keep, gain = (self._highest - highest).exp(), (logit - highest).exp()
        self._highest = highest
        self._mass = self._mass * keep + gain
        self._mix = self._mix * keep[..., None] + arrival.pair[..., 0, :] * gain[..., None]
        if (arrival.position + 1) % self._size == 0:
            self._close(self._mix / self._mass[..., None])
            self._open_region()
        elif arrival.leaving is not None and arrival.position - self._room.radius - 1 >= self.start:
            self.rest += arrival.leaving

    def _close(self, summary: Tensor) -> None:
        if self.num_closed == self._closed.shape[3]:
            # doubled, so that a step costs O(1) copies on average
            self._closed = pad(self._closed, (0, 0, 0, max(self.num_closed, 8)))
        self._closed[..., self.num_closed, :] = summary
        self.num_closed += 1

    def fill(self, arrival: Arrival) -> None:
        """Take a prompt in."""
        tokens = arrival.pair.shape[3]
        self.num_closed = tokens // self._size
        start = self.start
        pair = arrival.pair.to(self._room.sum_dtype)
        blocks = pair[..., :start, :].unflatten(3, (self.num_closed, self._size))
        share = arrival.pool_logit[..., :start].unflatten(2, (self.num_closed, self._size)).softmax(-1)
        self._closed = (share[..., None, :] @ blocks).squeeze(-2)
        if start < tokens:
            logit = arrival.pool_logit[..., start:]
            self._highest = logit.amax(-1)
            weight = (logit - self._highest[..., None]).exp()
            self._mass = weight.sum(-1)
            self._mix = (weight[..., None, :] @ pair[..., start:, :]).squeeze(-2)
        self.rest = pair[..., start : self._room.low(tokens), :].sum(3)

    @property
    def start(self) -> int:
        """First position that is in no complete region."""
        return self.num_closed * self._size

    def counts(self, low: int) -> Tensor:
        """Tokens of every complete region before the window, (1, regions)."""
        begin = torch.arange(self.num_closed, device=self._room.device) * self._size
        return (low - begin).clamp(0, self._size)[None]

    def region_of(self, position: Tensor) -> Tensor:
        """Region of a position."""
        return position // self._size

    def summaries(self, counts: Tensor) -> Part:
        """The summaries at given log-counts, (batch or 1, regions); an empty region is dropped by log 0 = -inf."""
        bias = counts.to(self._room.sum_dtype).log()
        return Part(self._closed[..., : self.num_closed, :], bias[:, None, None])

    def parts(self, tokens: int) -> list[Part]:
        """Complete regions and the rest of the open one."""
        low = self._room.low(tokens)
        parts = [self.summaries(self.counts(low))] if self.num_closed and low else []
        return parts + ([_mean_of(self.rest, low - self.start)] if low > self.start else [])

    def tensors(self) -> Iterator[Tensor]:
        """Summaries and the open region."""
        yield from (self._closed, self._mix, self._mass, self._highest, self.rest)


class GlobalState:
    """The top p tokens of all complete selection chunks, the open chunk, and the plain sum of all before the window.

    A token that a better one displaces returns to the remainder by itself: the remainder is the sum of everything
    before the window minus what is selected now. With `regions` (union) that sum is the open region's.
    """

    def __init__(self, room: Room, *, num_global_tokens: int, chunk: int, regions: RegionalState | None) -> None:
        self._room, self._limit, self._chunk, self._regions = room, num_global_tokens, chunk, regions
        self._all = RunningSum(room.zeros())
        self._selected, self._open = room.tokens(0), room.tokens(chunk)
        self._index = torch.zeros(room.batch, 0, dtype=torch.long, device=room.device)
        scores = torch.zeros(2, room.batch, chunk, dtype=room.sum_dtype, device=room.device)
        # strength and bias
        self._selected_scores, self._open_scores = scores[..., :0].clone(), scores

    def push(self, arrival: Arrival) -> None:
        """Take the next token in; the last one of a chunk makes its tokens eligible."""
        if self._regions is not None:
            self._regions.push(arrival)
        elif arrival.leaving is not None:
            self._all.add(arrival.leaving)
        place = arrival.position % self._chunk
        self._open[..., place, :] = arrival.pair[..., 0, :]
        self._open_scores[0, :, place] = arrival.strength[:, 0]
        self._open_scores[1, :, place] = arrival.bias[:, 0]
        if place == self._chunk - 1:
            self._select(self._open, self._open_scores, arrival.position - place)

    def fill(self, arrival: Arrival) -> None:
        """Take a prompt in."""
        tokens = arrival.pair.shape[3]
        if self._regions is not None:
            self._regions.fill(arrival)
        else:
            low = self._room.low(tokens)
            self._all = RunningSum(arrival.pair[..., :low, :].sum(3, dtype=self._room.sum_dtype))
        closed = tokens // self._chunk * self._chunk
        scores = torch.stack([arrival.strength, arrival.bias])
        self._select(arrival.pair[..., :closed, :], scores[..., :closed], 0)
        self._open[..., : tokens - closed, :] = arrival.pair[..., closed:, :]
        self._open_scores[..., : tokens - closed] = scores[..., closed:]

    def _select(self, pair: Tensor, scores: Tensor, position: int) -> None:
        """The best of the selected ones and the candidates that begin at `position`; earlier ones first among equals.

        Selected ones stand before all candidates and are sorted, so that a stable sort settles ties by position.
        """
        new = torch.arange(position, position + pair.shape[3], device=pair.device)
        index = torch.cat([self._index, new.expand(self._room.batch, -1)], 1)
        scores = torch.cat([self._selected_scores, scores], 2)
        pair = torch.cat([self._selected, pair], 3)
        best = torch.sort(scores[0], dim=1, descending=True, stable=True).indices[:, : self._limit]
        self._index = index.gather(1, best)
        self._selected_scores = scores.gather(2, best.expand(2, -1, -1))
        place = best[None, :, None, :, None]
        self._selected = pair.gather(3, place.expand(*pair.shape[:3], -1, pair.shape[4]))

    def parts(self, tokens: int) -> list[Part]:
        """Global tokens outside the window, region summaries with union, and the remainder."""
        low, regions = self._room.low(tokens), self._regions
        if low == 0:
            return []
        outside = self._index < low
        bias = torch.where(outside, self._selected_scores[1], -torch.inf)
        parts = [Part(self._selected, bias[:, None, None])]
        if regions is not None and regions.num_closed:
            parts.append(regions.summaries(regions.counts(low) - self._in_regions(regions, outside)))
        start, total = (0, self._all.total) if regions is None else (regions.start, regions.rest)
        if low > start:
            held = outside & (self._index >= start)
            given_back = held[:, None, None].to(self._room.sum_dtype) @ self._selected.to(self._room.sum_dtype)
            parts.append(_mean_of(total - given_back.squeeze(-2), low - start - held.sum(1)))
        return parts

    def _in_regions(self, regions: RegionalState, outside: Tensor) -> Tensor:
        """Selected tokens outside the window by complete region, (batch, regions)."""
        # one place more, for those of the open region
        counts = self._index.new_zeros(self._room.batch, regions.num_closed + 1)
        place = regions.region_of(self._index).clamp(max=regions.num_closed)
        return counts.scatter_add(1, place, outside.long())[:, :-1]

    def tensors(self) -> Iterator[Tensor]:
        """Selected tokens, the open chunk, sums."""
        yield from (self._selected, self._open, self._index, self._selected_scores, self._open_scores)
        yield from self._all.tensors()
        if self._regions is not None:
            yield from self._regions.tensors()


def _mean_of(total: Tensor, count: Tensor | int) -> Part:
    """The remainder entry: mean of keys and values with c = log count; (batch,) counts may be 0, which drops it."""
    number = torch.as_tensor(count, dtype=total.dtype, device=total.device).view(-1, 1, 1, 1)
    return Part(total[..., None, :] / number.clamp(min=1), number.log())
