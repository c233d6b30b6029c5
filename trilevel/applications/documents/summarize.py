"""A summary of one document by a model in torch."""

from __future__ import annotations

import numpy as np
import torch

from trilevel.applications.documents.data import collate
from trilevel.applications.documents.encoded import MAX_TOKENS, Encoded
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.summary import Summary, selection_of, summary_of
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.data.documents import Document


def score_units(model: DocumentModel, encoded: Encoded, *, focus_fraction: float | None = None) -> np.ndarray:
    """Scores of one document's units, (units,) float32; the model runs in evaluation mode and keeps its own mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            scores = model.details(collate([encoded]), focus_fraction=focus_fraction, explain=False).scores
            return np.asarray(scores[0].float().numpy())
    finally:
        model.train(was_training)


def summarize(
    model: DocumentModel,
    tokenizer: DocumentTokenizer,
    document: Document,
    *,
    num_sentences: int | None = None,
    budget_words: int | None = None,
    max_tokens: int = MAX_TOKENS,
    focus_fraction: float | None = None,
    max_overlap: float = 0.5,
) -> Summary:
    """Summarise a document within `num_sentences` or `budget_words` (59 words when neither is given).

    `focus_fraction` lets only that share of the units pass the deep layers (a model trained with focus); None runs all.

    Raises:
        InputError: the document has no word. ConfigError: both budgets are given, or one is below 1.
    """
    selection = selection_of(num_sentences=num_sentences, budget_words=budget_words, max_overlap=max_overlap)
    return summary_of(
        document,
        tokenizer,
        lambda encoded: score_units(model, encoded, focus_fraction=focus_fraction),
        selection,
        max_tokens=min(max_tokens, model.config.max_tokens),
    )
