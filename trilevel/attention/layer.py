"""`MultiLevelAttention`: projections, positions and parameters around `multi_level_attention`."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from trilevel.attention.api import Impl, dense_attention, dense_call, multi_level_attention
from trilevel.attention.cache import DecodeCache
from trilevel.attention.cost import Cost, attention_cost
from trilevel.attention.geometry import make_geometry, make_slots
from trilevel.attention.impl import graph
from trilevel.attention.levels import HeadSplit, Levels
from trilevel.attention.library import is_available
from trilevel.attention.rope import rotary, rotary_tables
from trilevel.attention.select import select_global
from trilevel.errors import ConfigError, ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a layer looked at: which tokens were global and why, and the regions.

    global_index: (batch, p) positions, one row a sequence. global_valid: whether the place is used. global_score:
    learned score; global_prior: prior; global_forced: whether forced; all (batch, p). region_index: (batch, tokens).
    """

    split: HeadSplit
    global_index: Tensor
    global_valid: Tensor
    global_score: Tensor
    global_prior: Tensor
    global_forced: Tensor
    region_index: Tensor


class MultiLevelAttention(nn.Module):
    """Self-attention with local, regional and global heads; `levels=None` is dense attention of the same weights.

    Follows `torch.nn.MultiheadAttention` with `batch_first=True` (embed_dim, num_heads, bias, masks that are True on
    padding), for self-attention only. Beyond the projections it learns `pool_weight` (kv_heads, dim; zero at first, so
    that regions start as plain means), `scorer` (the global-token score w . x_j) and, in `strict` mode, `region_gate`.

    Args:
        embed_dim: features of a token.
        num_heads: query heads; they stand in the order local, regional, global.
        head_dim: features of a head, default embed_dim // num_heads; given, num_heads * head_dim may differ from
            embed_dim, as in a pruned layer.
        levels: the levels, or None for dense attention.
        num_kv_heads: key and value heads (grouped queries), default num_heads.
        bias: biases in the projections.
        rope_theta: base of the rotary positions; None for none.
        is_causal: a token sees the past and itself.
        num_dense_heads: the last so many query heads see everything, in whole KV groups; the others share the ratio.
        impl: implementation of `multi_level_attention`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: sizes do not divide, or levels do not fit the heads.

    >>> layer = MultiLevelAttention(32, 4, levels=Levels(window=5, region_size=4, num_global_tokens=2))
    >>> layer(torch.zeros(2, 11, 32)).shape
    torch.Size([2, 11, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        levels: Levels | None,
        num_kv_heads: int | None = None,
        bias: bool = True,
        rope_theta: float | None = None,
        is_causal: bool = False,
        num_dense_heads: int = 0,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and embed_dim % num_heads) or kv_heads < 1 or num_heads % kv_heads:
            raise ConfigError(
                f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads} or head_dim be given, "
                f"and num_heads one of num_kv_heads={kv_heads}."
            )
        if head_dim is not None and head_dim < 1:
            raise ConfigError(f"head_dim={head_dim} must be >= 1; None takes embed_dim // num_heads.")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if rope_theta is not None and self.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head size, got {self.head_dim}.")
        if num_dense_heads and (levels is None or not 0 < num_dense_heads < num_heads):
            raise ConfigError(
                f"num_dense_heads={num_dense_heads} must be 0 to {num_heads - 1} of {num_heads} heads, beside heads "
                "with levels; a layer whose heads are all dense has levels=None."
            )
        if num_dense_heads % (num_heads // kv_heads):
            raise ConfigError(f"num_dense_heads={num_dense_heads} must be whole groups of {num_heads // kv_heads}.")
        self.num_dense_heads = num_dense_heads
        self.levels, self.rope_theta, self.is_causal, self.impl = levels, rope_theta, is_causal, impl
        self.in_proj = nn.Linear(
            embed_dim, (num_heads + 2 * kv_heads) * self.head_dim, bias=bias, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.head_split = HeadSplit(0, 0, 0)
        if levels is not None:
            groups = kv_heads - num_dense_heads * kv_heads // num_heads
            self.head_split = split = levels.ratio.split(num_heads - num_dense_heads, groups)
            # only what a head reads: a parameter without a gradient breaks data-parallel training
            pooled = torch.zeros(groups, self.head_dim, device=device, dtype=dtype)
            self.pool_weight = nn.Parameter(pooled) if split.regional or (levels.union and split.global_) else None
            if split.global_:
                self.scorer = nn.Linear(embed_dim, 1, bias=False, device=device, dtype=dtype)
            if levels.mode == "strict" and split.regional:
                self.region_gate = nn.Linear(embed_dim, split.regional, bias=False, device=device, dtype=dtype)
                nn.init.zeros_(self.region_gate.weight)

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = ...,
        segment_ids: Tensor | None = ...,
        num_segments: int | None = ...,
        positions: Tensor | None = ...,
        global_prior: Tensor | None = ...,
        global_forced: Tensor | None = ...,
        explain: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = ...,
        segment_ids: Tensor | None = ...,
        num_segments: int | None = ...,
        positions: Tensor | None = ...,
        global_prior: Tensor | None = ...,
        global_forced: Tensor | None = ...,
        explain: Literal[True],
    ) -> tuple[Tensor, Explanation]: ...
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        positions: Tensor | None = None,
        global_prior: Tensor | None = None,
        global_forced: Tensor | None = None,
        explain: bool = False,
    ) -> Tensor | tuple[Tensor, Explanation]:
        """Attend.

        Args:
            x: (batch, tokens, embed_dim).
            padding_mask: (batch, tokens) bool, True = padding.
            segment_ids: (batch, tokens) packed sequences, non-decreasing.
            num_segments: bound of the ids, required under compile and export.
            positions: (batch or 1, tokens) for the rotary embedding, default 0, 1, 2, ...
            global_prior: (batch, tokens) prior of a token as global token.
            global_forced: (batch, tokens) bool.
            explain: return (output, Explanation); one segment a row only.

        Returns:
            (batch, tokens, embed_dim).
        """
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ShapeError(f"x must be (batch, tokens, {self.embed_dim}), got {tuple(x.shape)}.")
        if padding_mask is not None:
            x = x.masked_fill(padding_mask[..., None], 0)
        # the kernels rotate while they read the fused projection
        is_rotary = self.rope_theta is not None and self.levels is not None and not self.num_dense_heads
        is_fused = is_rotary and _reads_fused(x, self.impl)
        q, k, v = self._split(x) if is_fused else self.project(x, positions)
        masks: dict[str, Any] = {
            "padding_mask": padding_mask,
            "segment_ids": segment_ids,
            "num_segments": num_segments,
            "is_causal": self.is_causal,
        }
        if self.levels is None:
            if explain:
                raise ConfigError("explain=True needs levels; this layer is dense (levels=None).")
            return self._merged(self._dense(q, k, v, masks))
        dense = None
        if self.num_dense_heads:
            (q, dense_q), (k, dense_k), (v, dense_v) = (self.without_dense(part) for part in (q, k, v))
            dense = self._dense(dense_q, dense_k, dense_v, masks)
        needs_score = hasattr(self, "scorer")
        score = self.scorer(x).squeeze(-1) if needs_score else None
        attended = multi_level_attention(
            q,
            k,
            v,
            levels=self.levels,
            pool_weight=self.pool_weight,
            global_score=score,
            global_prior=global_prior if needs_score else None,
            global_forced=global_forced if needs_score else None,
            region_gate=self.region_gate(x) if hasattr(self, "region_gate") else None,
            rotary=self._tables(x, positions) if is_fused else None,
            impl=self.impl,
            **masks,
        )
        out = self._merged(attended if dense is None else torch.cat([attended, dense], 1))
        if not explain:
            return out
        return out, self._explanation(self.levels, x, padding_mask, segment_ids, global_prior, global_forced)

    def cost(self, batch: int, tokens: int) -> Cost:
        """Cost of a forward pass without gradients: `attention_cost` and the projections.

        A projection of a token takes 2 * in * out operations; it reads its weights once, its input and writes its
        output. The peak holds queries, keys and values beside the attention's own.

        Raises:
            ConfigError: batch or tokens are not positive.
        """
        weight = self.in_proj.weight
        size, rows = weight.element_size(), batch * tokens
        dense = self.num_dense_heads
        parts = [(self.levels, self.num_heads - dense), (None, dense)]
        attention = functools.reduce(
            operator.add,
            (
                attention_cost(
                    levels,
                    batch=batch,
                    num_heads=heads,
                    num_kv_heads=heads * self.num_kv_heads // self.num_heads,
                    tokens=tokens,
                    head_dim=self.head_dim,
                    bytes_per_value=size,
                    is_causal=self.is_causal,
                )
                for levels, heads in parts
                if heads
            ),
        )
        # biases, the pooling weights and positions are small beside these
        shapes = [module.weight.shape for module in self.children() if isinstance(module, nn.Linear)]
        flops = sum(2 * rows * wide * narrow for wide, narrow in shapes)
        moved = sum(size * (wide * narrow + rows * (wide + narrow)) for wide, narrow in shapes)
        held = size * rows * weight.shape[0]
        return Cost(attention.flops + flops, attention.bytes_moved + moved, attention.peak_bytes + held)

    def new_cache(self, batch: int) -> DecodeCache:
        """An empty cache for `prefill` and `step`, of the parameters' type and device.

        Raises:
            ConfigError: the layer is dense or not causal, or its levels cannot be decoded token by token.
        """
        if self.levels is None or not self.is_causal or self.num_dense_heads:
            raise ConfigError(
                f"a decode cache needs a causal layer with levels in all heads, got is_causal={self.is_causal}, "
                f"levels={self.levels} and num_dense_heads={self.num_dense_heads}. Make the layer with is_causal=True "
                "and levels."
            )
        weight = self.in_proj.weight
        return DecodeCache(
            self.levels,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            batch=batch,
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.no_grad()
    def prefill(self, x: Tensor, cache: DecodeCache, *, global_prior: Tensor | None = None) -> Tensor:
        """Attend over a prompt and remember it in an empty cache; no gradient.

        x (batch, tokens, embed_dim), global_prior (batch, tokens), every row as long as the others. Returns what
        `forward` does.
        """
        levels = self._decoded_levels(x, cache)
        q, k, v = self.project(x)
        score = self._decode_score(x, global_prior)
        cache.prefill(k, v, score=score, pool_weight=self.pool_weight)
        attended = multi_level_attention(
            q, k, v, levels=levels, pool_weight=self.pool_weight, global_score=score, is_causal=True, impl=self.impl
        )
        return self._merged(attended)

    @torch.no_grad()
    def step(self, x: Tensor, cache: DecodeCache, *, global_prior: Tensor | None = None) -> Tensor:
        """Attend with the next token and remember it: row `cache.num_tokens` of `forward`; no gradient.

        x (batch, 1, embed_dim), global_prior (batch, 1). Returns (batch, 1, embed_dim).
        """
        self._decoded_levels(x, cache)
        q, k, v = self.project(x, torch.tensor([[cache.num_tokens]], device=x.device))
        score = self._decode_score(x, global_prior)
        return self._merged(cache.step(q, k, v, score=score, pool_weight=self.pool_weight))

    def _decoded_levels(self, x: Tensor, cache: DecodeCache) -> Levels:
        if x.ndim != 3 or x.shape[2] != self.embed_dim:
            raise ShapeError(f"x must be (batch, tokens, {self.embed_dim}), got {tuple(x.shape)}.")
        if self.levels is None or not self.is_causal or self.levels != cache.levels:
            raise ConfigError("the cache was made for other levels; make it with new_cache of this layer.")
        return self.levels

    def _decode_score(self, x: Tensor, prior: Tensor | None) -> Tensor | None:
        """Learned score plus prior, (batch, tokens); None without global heads."""
        if not hasattr(self, "scorer"):
            return None
        score: Tensor = self.scorer(x).squeeze(-1)
        if prior is None:
            return score
        if prior.shape != score.shape:
            raise ShapeError(f"global_prior must have shape {tuple(score.shape)}, got {tuple(prior.shape)}.")
        return score + prior

    def project(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (rotated) and values: (batch, heads or kv_heads, tokens, head_dim)."""
        q, k, v = self._split(x)
        if self.rope_theta is not None:
            place = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            q, k = rotary(q, place, theta=self.rope_theta), rotary(k, place, theta=self.rope_theta)
            # q and k are copies now; with v copied too, the fused projection is freed before attention runs
            v = v.contiguous()
        return q, k, v

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the fused projection, nothing rotated."""
        batch, tokens, _ = x.shape
        heads, groups = self.num_heads, self.num_kv_heads
        fused = self.in_proj(x).view(batch, tokens, heads + 2 * groups, self.head_dim).transpose(1, 2)
        q, k, v = fused.split([heads, groups, groups], 1)
        return q, k, v

    def without_dense(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Heads with levels and dense heads of queries, or their groups of keys or values."""
        dense = self.num_dense_heads * x.shape[1] // self.num_heads
        return x[:, :-dense], x[:, -dense:]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Any]) -> Tensor:
        call = dense_call(q, k, v, **masks)
        # torch's own marks rows that see NaN by adding into places, for which TensorRT has no operator
        is_exported = self.impl == "graph" or (self.impl == "native" and torch.compiler.is_exporting())
        is_exported = is_exported and graph.obstacle(call) is None
        return graph.dense(call) if is_exported else dense_attention(call)

    def _tables(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.rope_theta is not None
        if positions is None:
            return _tables_from_zero(x.shape[1], self.head_dim, self.rope_theta)
        return rotary_tables(positions, self.head_dim, theta=self.rope_theta)

    def _merged(self, attended: Tensor) -> Tensor:
        merged: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return merged

    @torch.no_grad()
    def _explanation(
        self,
        levels: Levels,
        x: Tensor,
        padding_mask: Tensor | None,
        segment_ids: Tensor | None,
        prior: Tensor | None,
        forced: Tensor | None,
    ) -> Explanation:
        if not hasattr(self, "scorer"):
            raise ConfigError(f"explain=True explains global tokens; {levels.ratio} has no global heads.")
        if segment_ids is not None or self.is_causal:
            raise ConfigError("explain=True explains one bidirectional sequence a row; segment_ids must be None.")
        batch, tokens, _ = x.shape
        score = self.scorer(x).squeeze(-1)
        prior = torch.zeros_like(score) if prior is None else prior.expand(batch, tokens).to(score.dtype)
        forced = torch.zeros_like(score, dtype=torch.bool) if forced is None else forced
        valid = None if padding_mask is None else ~padding_mask
        geometry = make_geometry(
            tokens,
            radius=levels.radius,
            valid=valid,
            segment=None,
            num_segments=1,
            is_causal=False,
            device=x.device,
        )
        chosen = select_global(score + prior, forced, geometry, num_global_tokens=levels.num_global_tokens, chunk=None)
        index = chosen.index[:, 0]
        slots = make_slots(geometry, size=levels.region_size, num_slots=levels.num_regions)
        return Explanation(
            split=self.head_split,
            global_index=index,
            global_valid=chosen.valid[:, 0],
            global_score=score.gather(1, index),
            global_prior=prior.gather(1, index),
            global_forced=forced.gather(1, index),
            region_index=slots.of_token.expand(batch, -1),
        )

    def extra_repr(self) -> str:
        """Sizes and levels."""
        sizes = f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{self.embed_dim}, {sizes}, levels={self.levels}"


def _reads_fused(x: Tensor, impl: Impl) -> bool:
    """Whether attention runs in kernels that rotate what they read: in inference, by `native`."""
    is_plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return is_plain and impl in ("auto", "native") and x.device.type == "cpu" and is_available()


@lru_cache(maxsize=2)
def _tables_from_zero(tokens: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Tables of positions 0, 1, 2, ..., which the layers of a model share."""
    return rotary_tables(torch.arange(tokens)[None], dim, theta=theta)
