"""One forward pass of the document model under each kind of attention that the demo compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from trilevel.applications.documents.checkpoint import load_run
from trilevel.applications.documents.data import DocumentBatch, collate
from trilevel.applications.documents.encoded import Encoded
from trilevel.applications.documents.materialised import materialise
from trilevel.applications.documents.measure import Attention
from trilevel.applications.documents.model import DocumentModel


def load_variant(folder: str | None, attention: Attention) -> DocumentModel:
    """The model of a folder (None: the shipped one) with this attention and the same weights, in float32 but one."""
    model = load_run(folder)[0].float()
    if attention == "bfloat16":
        model = model.bfloat16()
    if attention in ("sdpa", "materialised"):
        # the twin alone stays in memory
        model = model.dense()
    if attention == "materialised":
        materialise(model)
    return model.eval()


def prepare(model: DocumentModel, encoded: Encoded, attention: Attention) -> Callable[[], np.ndarray]:
    """The pass to measure; it gives the scores of the document's units, (units,) float32.

    With `focus`, the configured share of the units passes the deep blocks, else all do.
    """
    focus = model.config.focus
    fraction = focus.fraction if attention == "focus" and focus is not None else None
    batch = without_padding(collate([encoded]))

    @torch.inference_mode()
    def run() -> np.ndarray:
        scores = cast("Tensor", model(batch, focus_fraction=fraction))
        return scores[0].float().numpy()

    return run


def without_padding(batch: DocumentBatch) -> DocumentBatch:
    """The batch of one document without its masks: nothing is padded, and every kind of attention is faster for it."""
    return cast("DocumentBatch", {**batch, "padding_mask": None, "unit_padding": None})
