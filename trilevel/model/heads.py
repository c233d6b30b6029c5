"""What reads the encoder's output: one answer for the input, for each token, or for each unit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from trilevel.errors import ConfigError
from trilevel.model.pool import check_unit_ids, count_units, mean_by_unit, sum_by_slot, unit_slots

Pooling = Literal["mean", "attention"]


class SequenceHead(nn.Module):
    """Mean of the tokens, then logits: `(batch, tokens, dim)` to `(batch, classes)`."""

    def __init__(self, dim: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Padding (true in `padding_mask`) does not count; an input of padding alone has mean zero."""
        logits: Tensor = self.logits(self.dropout(mean_of_tokens(x, padding_mask)))
        return logits


class TokenHead(nn.Module):
    """Logits of each token: `(batch, tokens, dim)` to `(batch, tokens, classes)`."""

    def __init__(self, dim: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token on its own."""
        logits: Tensor = self.logits(self.dropout(x))
        return logits


class SpanHead(nn.Module):
    """A vector and a score for each unit (sentence, heading, span) of the input.

    Args:
        dim: width of a token.
        pooling: `mean` of a unit's tokens, or `attention`: weights by a softmax of a learned score over its tokens,
            which starts as the mean.
        dropout: before the score.
    """

    def __init__(self, dim: int, *, pooling: Pooling = "mean", dropout: float = 0.0) -> None:
        super().__init__()
        if pooling not in ("mean", "attention"):
            raise ConfigError(f"SpanHead: pooling={pooling!r} is neither 'mean' nor 'attention'.")
        self.weigh = nn.Linear(dim, 1, bias=False) if pooling == "attention" else None
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(dim, 1)
        if self.weigh is not None:
            nn.init.zeros_(self.weigh.weight)

    def forward(
        self, x: Tensor, unit_ids: Tensor, *, num_units: int | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pool `x` (batch, tokens, dim) by `unit_ids` (batch, tokens) to (batch, units, dim) and score (batch, units).

        A unit without tokens has vector zero. `num_units` (default: largest id + 1) is above every id; negative ids
        and padding count nowhere.
        """
        if self.weigh is None:
            units, _ = mean_by_unit(x, unit_ids, num_units=num_units, padding_mask=padding_mask)
        else:
            units = weighted_by_unit(x, self.weigh(x).squeeze(-1), unit_ids, num_units, padding_mask)
        return units, self.score(self.dropout(units)).squeeze(-1)


def mean_of_tokens(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Mean over the real tokens, (batch, tokens, dim) to (batch, dim), summed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # the axis is kept at first: without it OpenVINO 2026.4.1 fuses what follows, such as the factor of each feature in
    # front of an INT8 map, and takes the wrong axis for it
    if padding_mask is None:
        return x.mean(dim=1, keepdim=True, dtype=wide).squeeze(1).to(x.dtype)
    total = x.masked_fill(padding_mask[..., None], 0).sum(dim=1, keepdim=True, dtype=wide).squeeze(1)
    return (total / (~padding_mask).sum(dim=1, keepdim=True).clamp(min=1)).to(x.dtype)


def weighted_by_unit(
    x: Tensor, logits: Tensor, unit_ids: Tensor, num_units: int | None, padding_mask: Tensor | None
) -> Tensor:
    """Pool `x` (batch, tokens, dim) with a softmax of `logits` (batch, tokens) over the tokens of each unit."""
    check_unit_ids(x, unit_ids)
    batch = x.shape[0]
    num_units = count_units(unit_ids) if num_units is None else num_units
    slots, num_slots = unit_slots(unit_ids, num_units, padding_mask), batch * num_units
    flat = logits.float().flatten() if logits.dtype.itemsize < 4 else logits.flatten()
    with torch.no_grad():
        largest = flat.new_full((num_slots + 1,), -torch.inf).scatter_reduce(0, slots, flat, "amax")
    # the spare slot holds whatever padding holds; its weights are set to zero before anything is summed
    weights = torch.where(slots < num_slots, flat - largest[slots], -torch.inf).exp()
    values = torch.where((slots < num_slots)[:, None], x.flatten(0, 1) * weights[:, None], 0)
    totals = sum_by_slot(weights, slots, num_slots)
    pooled = sum_by_slot(values, slots, num_slots) / totals.clamp(min=torch.finfo(totals.dtype).tiny)[:, None]
    return pooled.to(x.dtype).view(batch, num_units, -1)
