"""One validated attention call, as every implementation gets it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trilevel.attention.levels import HeadSplit, Levels


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Arguments of `multi_level_attention` after validation.

    Shapes: query (batch, heads, tokens, dim), key and value (batch, kv_heads, tokens, dim), pool_weight
    (kv_heads, dim), score (batch, tokens) = learned score + prior, forced (batch, tokens) bool, region_gate
    (batch, tokens, regional heads), valid (batch, tokens) bool with True = real token or None when all are, segment
    (batch, tokens) int64 or None when there is one segment. `split` counts query heads.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    levels: Levels
    split: HeadSplit
    pool_weight: Tensor | None
    score: Tensor | None
    forced: Tensor | None
    region_gate: Tensor | None
    valid: Tensor | None
    segment: Tensor | None
    num_segments: int
    is_causal: bool
    scale: float
    needs_lse: bool = True
    # cosines and sines by which query and key are still to be rotated; only `native` gets such a call
    rotary: tuple[Tensor, Tensor] | None = None

    @property
    def has_strict_entries(self) -> bool:
        """Whether strict regional or global heads are among its heads: dense attention among a few entries."""
        return self.levels.mode == "strict" and self.split.regional + self.split.global_ > 0


def empty_output(query: Tensor) -> Tensor:
    """Memory for an output like `query`, tokens before heads: what the output projection reads. Not a view."""
    _, heads, tokens, dim = query.shape
    return query.new_empty_strided(query.shape, (tokens * heads * dim, dim, heads * dim, 1))
