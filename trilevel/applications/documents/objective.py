"""The loss: which sentences the oracle takes, as a distribution over each document's sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.applications.documents.data import DocumentBatch

# an oracle sentence that shares little with the abstract by itself still counts a little
_LEAST_GAIN = 0.02


def oracle_loss(scores: Tensor, batch: DocumentBatch) -> Tensor:
    """Cross entropy of softmax(scores) over a document's selectable units against its oracle, mean over documents.

    An oracle sentence weighs as much as its own ROUGE-1 + ROUGE-2 F1: on validation this did better than equal weights
    (docs/documents.md). `scores` (batch, units); documents without an oracle sentence count nowhere.
    """
    mask = batch["unit_selectable"]
    weight = batch["oracle"] * mask * (batch["gains"] + _LEAST_GAIN)
    total = weight.sum(dim=1, keepdim=True)
    logs = torch.log_softmax(scores.float().masked_fill(~mask, torch.finfo(torch.float32).min), dim=1)
    losses = -(torch.where(mask, logs, 0.0) * weight / total.clamp(min=1e-6)).sum(dim=1)
    return losses.sum() / (total > 0).sum().clamp(min=1)


def _oracle_alone(model: nn.Module, batch: DocumentBatch) -> dict[str, Tensor]:
    loss = oracle_loss(model(batch), batch)
    return {"loss": loss, "oracle": loss}


def objective(
    *, focus_weight: float, focus_share: float = 0.0, focus_fraction: float = 0.2
) -> Callable[[nn.Module, Any], dict[str, Tensor]]:
    """What `fit` minimises: the oracle loss of the scores plus `focus_weight` times that of the focus scorer.

    `focus_share` of the steps, drawn from torch's generator, send `focus_fraction` of the units through the deep
    blocks; the others send all. Without both the model needs no focus.
    """
    if not (focus_weight or focus_share):
        return _oracle_alone

    def losses(model: nn.Module, batch: DocumentBatch) -> dict[str, Tensor]:
        is_focused = focus_share > 0 and float(torch.rand(())) < focus_share
        fraction = focus_fraction if is_focused else 1.0
        scores, focus_scores = model(batch, focus_fraction=fraction, with_focus_scores=True)
        found = {"oracle": oracle_loss(scores, batch), "focus": oracle_loss(focus_scores, batch)}
        return {"loss": found["oracle"] + focus_weight * found["focus"], **found}

    return losses
