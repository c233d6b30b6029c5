"""Focus: only the most important units of a document go on through the deep blocks, compacted (DESIGN.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.errors import ConfigError
from trilevel.model.pool import mean_by_unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Focus:
    """Where the text is thinned out, and to which part of its units.

    Args:
        after_layer: blocks that every token passes, >= 1; a small scorer then ranks the units.
        fraction: share of the units of a row that pass the remaining blocks, in (0, 1]; at least one unit does.
    """

    after_layer: int
    fraction: float = 0.2

    def __post_init__(self) -> None:
        """Check both values."""
        if self.after_layer < 1:
            raise ConfigError(
                f"Focus: after_layer={self.after_layer} must be >= 1; the scorer reads what a block wrote."
            )
        check_fraction(self.fraction, "Focus: fraction")


def check_fraction(fraction: float, name: str) -> None:
    """Raise `ConfigError` unless `fraction` lies in (0, 1]."""
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"{name}={fraction} must lie in (0, 1]; 0.2 keeps a fifth of the units, 1.0 all.")


class UnitScorer(nn.Module):
    """One number for each unit: the mean over its tokens of a linear map of the normalised state."""

    def __init__(self, dim: int, *, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.score = nn.Linear(dim, 1)

    def forward(
        self, x: Tensor, unit_ids: Tensor, *, num_units: int | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """Scores (batch, units) of `x` (batch, tokens, dim); -inf for a unit without tokens."""
        scores, counts = mean_by_unit(
            self.score(self.norm(x)).squeeze(-1), unit_ids, num_units=num_units, padding_mask=padding_mask
        )
        return scores.masked_fill(counts == 0, -torch.inf)


def top_units(scores: Tensor, fraction: float) -> Tensor:
    """The units that go on, (batch, units) bool: `ceil(fraction * units)` of each row, ties by lower index.

    Units with score -inf do not exist; a row without any keeps none.
    """
    exists = scores > -torch.inf
    # the small step back keeps 0.2 * 35 at 7, which binary fractions make 7.000000000000001
    kept = torch.ceil(exists.sum(dim=1, keepdim=True).double() * fraction - 1e-9)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )
    return exists & (rank < kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """The tokens that go on, moved together; only `(batch, kept)` of them are computed.

    Attributes:
        index: (batch, kept) int, where each stands in the whole text, in order; arbitrary at padding.
        padding_mask: (batch, kept) bool, true behind the tokens of a row that keeps fewer than the largest.
    """

    index: Tensor
    padding_mask: Tensor

    @classmethod
    def of(cls, keep: Tensor) -> Compact:
        """Compact the tokens that `keep` (batch, tokens) names; waits for the device to learn the length."""
        counts = keep.sum(dim=1)
        kept = max(1, int(counts.max()))
        # a stable sort puts the kept tokens first, in their order
        index = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :kept]
        return cls(index=index, padding_mask=torch.arange(kept, device=keep.device) >= counts[:, None])

    def gather(self, values: Tensor) -> Tensor:
        """Take the kept tokens of (batch, tokens) or (batch, tokens, dim)."""
        index = self.index if values.ndim == 2 else self.index[..., None].expand(-1, -1, values.shape[2])
        return values.gather(1, index)

    def gather_segments(self, segment_ids: Tensor) -> Tensor:
        """Segments of the kept tokens; padding joins the last one, for ids must not decrease."""
        return torch.where(self.padding_mask, segment_ids[:, -1:], self.gather(segment_ids))

    def scatter(self, deep: Tensor, shallow: Tensor) -> Tensor:
        """The state `shallow` (batch, tokens, dim) with the kept tokens replaced by `deep` (batch, kept, dim)."""
        # padding writes back what stands there already: indices of a row are all different
        values = torch.where(self.padding_mask[..., None], self.gather(shallow), deep).to(shallow.dtype)
        index = self.index[..., None].expand_as(values)
        return shallow.scatter(1, index, values) if torch.is_grad_enabled() else shallow.scatter_(1, index, values)


def tokens_of(keep_units: Tensor, unit_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Which tokens stand in a kept unit, (batch, tokens) bool; tokens of no unit and padding do not."""
    keep = keep_units.gather(1, unit_ids.clamp(min=0)) & (unit_ids >= 0)
    return keep if padding_mask is None else keep & ~padding_mask


def pass_gradient(deep: Tensor, shallow: Tensor, token_scores: Tensor) -> Tensor:
    """Return `deep` unchanged and send the scorer the gradient of gating `deep - shallow` by `log sigmoid(score)`.

    Without it the choice of units would teach the scorer nothing (straight-through, this project's own choice).
    """
    gate = F.logsigmoid(token_scores)
    return deep + (deep - shallow).detach() * (gate - gate.detach())[..., None]
