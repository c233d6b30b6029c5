"""Losses that mask what does not count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trilevel.errors import ShapeError


def unit_score_loss(scores: Tensor, labels: Tensor, mask: Tensor, *, positive_weight: float = 1.0) -> Tensor:
    """Binary cross entropy of unit scores (logits), the mean over the units that count.

    Args:
        scores: (batch, units) logits; anything where `mask` is false, infinities included.
        labels: (batch, units) in [0, 1].
        mask: (batch, units) bool, true where a unit counts.
        positive_weight: weight of the positive part, for rare labels.

    Returns:
        A scalar, zero if no unit counts.
    """
    if not scores.shape == labels.shape == mask.shape:
        raise ShapeError(
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)} and mask {tuple(mask.shape)} must all be "
            "(batch, units)."
        )
    mask = mask.bool()
    # replaced, not multiplied: zero times an infinite score is no number
    scores = torch.where(mask, scores, torch.zeros_like(scores)).float()
    targets = torch.where(mask, labels.to(scores.dtype), torch.zeros_like(scores))
    weight = scores.new_tensor(positive_weight)
    losses = F.binary_cross_entropy_with_logits(scores, targets, pos_weight=weight, reduction="none")
    return torch.where(mask, losses, torch.zeros_like(losses)).sum() / mask.sum().clamp(min=1)


def sequence_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of `logits` (batch, classes) and `labels` (batch,), a scalar."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def token_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy of `logits` (batch, tokens, classes) and `labels` (batch, tokens), the mean where `mask` is true.

    Without a mask every token counts. Zero if none does.
    """
    if logits.shape[:2] != labels.shape or (mask is not None and mask.shape != labels.shape):
        raise ShapeError(
            f"logits {tuple(logits.shape)} need labels and mask of shape {tuple(logits.shape[:2])}, "
            f"got {tuple(labels.shape)} and {None if mask is None else tuple(mask.shape)}."
        )
    if mask is None:
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    counted = mask.bool()
    safe = torch.where(counted[..., None], logits, torch.zeros_like(logits)).float().flatten(0, 1)
    losses = F.cross_entropy(safe, labels.masked_fill(~counted, 0).flatten(), reduction="none")
    return (losses * counted.flatten()).sum() / counted.sum().clamp(min=1)
