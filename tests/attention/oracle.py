"""Multi-level attention written token by token from its definition: every query lists its entries, one softmax each.

An entry is (key, value, log-count); a head's output is `softmax(scale * q.key + log_count) @ value`. Nothing here is
shared with the package, and nothing is vectorised over queries, so a mistake in a mask cannot hide in both places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from trilevel.attention.levels import Levels
from trilevel.errors import ConfigError


@dataclass
class Entries:
    """The list that one query of one head attends to."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    log_counts: list[Tensor] = field(default_factory=list)

    def add(self, key: Tensor, value: Tensor, log_count: Tensor | float = 0.0) -> None:
        self.keys.append(key)
        self.values.append(value)
        self.log_counts.append(torch.as_tensor(log_count, dtype=key.dtype))

    def attend(self, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if not self.keys:
            return torch.zeros_like(query), query.new_full((), -math.inf)
        logits = scale * (torch.stack(self.keys) @ query) + torch.stack(self.log_counts)
        return torch.softmax(logits, 0) @ torch.stack(self.values), torch.logsumexp(logits, 0)


def split_heads(shares: tuple[float, float, float], heads: int, kv_heads: int) -> tuple[int, int, int]:
    """Largest remainder over whole KV groups; ties to the earlier class; one group at least for a share above zero."""
    if kv_heads < sum(share > 0 for share in shares):
        raise ConfigError("fewer KV groups than non-zero shares")
    exact = [Fraction(share) * kv_heads / sum(map(Fraction, shares)) for share in shares]
    counts = [math.floor(quota) for quota in exact]
    while sum(counts) < kv_heads:
        left = [quota - count for quota, count in zip(exact, counts, strict=True)]
        counts[left.index(max(left))] += 1
    for level, share in enumerate(shares):
        if share > 0 and counts[level] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[level] += 1
    group = heads // kv_heads
    return counts[0] * group, counts[1] * group, counts[2] * group


@dataclass
class Segment:
    """The real tokens of one segment of one batch row, in order; `rank[j]` is the place of token j among them."""

    tokens: list[int]
    region_size: int
    rank: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = {token: place for place, token in enumerate(self.tokens)}

    def region(self, token: int) -> int:
        return self.rank[token] // self.region_size

    def members(self, region: int) -> list[int]:
        return self.tokens[region * self.region_size : (region + 1) * self.region_size]

    @property
    def num_regions(self) -> int:
        return math.ceil(len(self.tokens) / self.region_size)


@dataclass
class Head:
    """One head of one segment: its vectors, and what the levels say about them."""

    levels: Levels
    segment: Segment
    q: Tensor
    k: Tensor
    v: Tensor
    pool: Tensor
    score: Tensor
    forced: Tensor
    is_causal: bool
    scale: float

    @property
    def w(self) -> int:
        return (self.levels.window - 1) // 2

    def visible(self, i: int) -> list[int]:
        return [j for j in self.segment.tokens if j <= i or not self.is_causal]

    def near(self, i: int) -> list[int]:
        return [j for j in self.visible(i) if abs(i - j) <= self.w]

    def bias(self, j: int) -> Tensor:
        g = torch.nn.functional.logsigmoid(self.score[j])
        return g if self.levels.selection_gradient == "gate" else g - g.detach()

    def select(self, candidates: list[int]) -> list[int]:
        """Forced ones first, then by score, then by position."""
        order = sorted(candidates, key=lambda j: (not bool(self.forced[j]), -float(self.score[j].detach()), j))
        return order[: self.levels.num_global_tokens]

    def selected(self, i: int) -> list[int]:
        if not self.is_causal:
            return self.select(self.segment.tokens)
        chunk = self.levels.selection_chunk or self.w + 1
        closed = (self.segment.rank[i] + 1) // chunk * chunk
        return self.select(self.segment.tokens[:closed])

    def pooled(self, region: int, x: Tensor) -> Tensor:
        members = self.segment.members(region)
        weights = torch.softmax(torch.stack([self.pool @ self.k[j] for j in members]), 0)
        return weights @ torch.stack([x[j] for j in members])

    def complete(self, region: int, i: int) -> bool:
        return not self.is_causal or (region + 1) * self.segment.region_size <= self.segment.rank[i] + 1

    def add_tokens(self, entries: Entries, tokens: list[int]) -> None:
        for j in tokens:
            entries.add(self.k[j], self.v[j])

    def add_remainder(self, entries: Entries, tokens: list[int]) -> None:
        if tokens:
            key = torch.stack([self.k[j] for j in tokens]).mean(0)
            value = torch.stack([self.v[j] for j in tokens]).mean(0)
            entries.add(key, value, math.log(len(tokens)))

    def add_regions(self, entries: Entries, i: int, without: set[int]) -> list[int]:
        """One summary per region that i may use, at the count of its tokens not in `without`; returns those tokens."""
        counted: list[int] = []
        for region in range(self.segment.num_regions):
            members = [j for j in self.segment.members(region) if j not in without]
            if self.complete(region, i) and members:
                entries.add(self.pooled(region, self.k), self.pooled(region, self.v), math.log(len(members)))
                counted += members
        return counted

    def local(self, i: int) -> Entries:
        entries = Entries()
        near, visible = self.near(i), self.visible(i)
        sinks = [j for j in visible if self.segment.rank[j] < self.levels.num_sinks and j not in near]
        self.add_tokens(entries, near)
        if self.levels.mode == "calibrated":
            self.add_tokens(entries, sinks)
            self.add_remainder(entries, [j for j in visible if j not in near and j not in sinks])
        return entries

    def regional(self, i: int) -> Entries:
        entries = Entries()
        near = self.near(i)
        self.add_tokens(entries, near)
        counted = self.add_regions(entries, i, set(near))
        self.add_remainder(entries, [j for j in self.visible(i) if j not in near and j not in counted])
        return entries

    def global_(self, i: int) -> Entries:
        entries = Entries()
        near = self.near(i)
        chosen = [j for j in self.selected(i) if j not in near]
        self.add_tokens(entries, near)
        for j in chosen:
            entries.add(self.k[j], self.v[j], self.bias(j))
        seen = {*near, *chosen}
        if self.levels.union:
            seen |= set(self.add_regions(entries, i, seen))
        self.add_remainder(entries, [j for j in self.visible(i) if j not in seen])
        return entries

    def dense(self, i: int) -> Entries:
        entries = Entries()
        self.add_tokens(entries, self.visible(i))
        return entries

    def strict_regional(self, i: int, gate: Tensor) -> tuple[Tensor, Tensor]:
        entries = Entries()
        for region in range(self.segment.num_regions):
            entries.add(self.pooled(region, self.k), self.pooled(region, self.v))
        out, lse = entries.attend(self.pooled(self.segment.region(i), self.q), self.scale)
        return out * 2 * torch.sigmoid(gate), lse

    def strict_global(self, i: int) -> Entries:
        entries = Entries()
        chosen = self.select(self.segment.tokens)
        for j in chosen if i in chosen else []:
            entries.add(self.k[j], self.v[j], self.bias(j))
        return entries


def _segments(levels: Levels, valid: Tensor, segment: Tensor) -> list[Segment]:
    found = []
    for name in sorted(set(segment.tolist())):
        tokens = [j for j in range(len(valid)) if bool(valid[j]) and int(segment[j]) == name]
        if tokens:
            size = levels.region_size or math.ceil(len(tokens) / (levels.num_regions or 1))
            found.append(Segment(tokens, size))
    return found


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    levels: Levels,
    pool_weight: Tensor | None = None,
    global_score: Tensor | None = None,
    global_prior: Tensor | None = None,
    global_forced: Tensor | None = None,
    region_gate: Tensor | None = None,
    padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`multi_level_attention(..., return_lse=True)` one query at a time; same arguments, same shapes."""
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    shares = (levels.ratio.local, levels.ratio.regional, levels.ratio.global_)
    num_local, num_regional, _ = split_heads(shares, heads, kv_heads)
    zeros = query.new_zeros(batch, tokens)
    score = zeros + (0 if global_score is None else global_score) + (0 if global_prior is None else global_prior)
    forced = zeros.bool() if global_forced is None else global_forced
    valid = zeros == 0 if padding_mask is None else ~padding_mask
    segment = zeros.long() if segment_ids is None else segment_ids
    pool = query.new_zeros(kv_heads, dim) if pool_weight is None else pool_weight
    is_dense = levels.dense_below is not None and tokens < levels.dense_below

    rows = [[[zeros.new_zeros(dim)] * tokens for _ in range(heads)] for _ in range(batch)]
    lses = [[[zeros.new_full((), -math.inf)] * tokens for _ in range(heads)] for _ in range(batch)]
    for b in range(batch):
        for part in _segments(levels, valid[b], segment[b]):
            for h in range(heads):
                g = h // (heads // kv_heads)
                head = Head(
                    levels=levels,
                    segment=part,
                    q=query[b, h],
                    k=key[b, g],
                    v=value[b, g],
                    pool=pool[g],
                    score=score[b],
                    forced=forced[b],
                    is_causal=is_causal,
                    scale=dim**-0.5 if scale is None else scale,
                )
                for i in part.tokens:
                    if is_dense:
                        entries = head.dense(i)
                    elif h < num_local:
                        entries = head.local(i)
                    elif h < num_local + num_regional:
                        if levels.mode == "strict":
                            logit = zeros.new_zeros(()) if region_gate is None else region_gate[b, i, h - num_local]
                            rows[b][h][i], lses[b][h][i] = head.strict_regional(i, logit)
                            continue
                        entries = head.regional(i)
                    else:
                        entries = head.strict_global(i) if levels.mode == "strict" else head.global_(i)
                    rows[b][h][i], lses[b][h][i] = entries.attend(head.q[i], head.scale)
    out = torch.stack([torch.stack([torch.stack(row) for row in plane]) for plane in rows])
    lse = torch.stack([torch.stack([torch.stack(row) for row in plane]) for plane in lses])
    return out, lse
