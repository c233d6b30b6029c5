"""A summary of one document: units, tokens, scores, choice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trilevel.applications.documents.data import MAX_TOKENS, Encoded, collate, encode
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.select import Selection, by_score, choose
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import Unit, split_units
from trilevel.data.documents import Document

# median length of a summary in the training split of the technical documents, in words
DEFAULT_BUDGET_WORDS = 59


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The chosen sentences in document order and what led to them.

    `indices` point into `units`; `scores` (units,) are the model's logits; `units_left_out` counts units beyond the
    token limit; `seconds` is the time of the model alone.
    """

    sentences: list[str]
    indices: list[int]
    units: list[Unit]
    scores: np.ndarray
    num_tokens: int
    units_left_out: int
    seconds: float


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
    words = DEFAULT_BUDGET_WORDS if num_sentences is None and budget_words is None else budget_words
    selection = Selection(words=words, sentences=num_sentences, max_overlap=max_overlap)
    units = split_units(document)
    encoded = encode(units, tokenizer, max_tokens=min(max_tokens, model.config.max_tokens))
    start = time.perf_counter()
    scores = score_units(model, encoded, focus_fraction=focus_fraction)
    seconds = time.perf_counter() - start
    indices = choose_units(units, scores, encoded, selection)
    return Summary(
        sentences=[units[i].text for i in indices],
        indices=indices,
        units=units[: len(scores)],
        scores=scores,
        num_tokens=encoded.num_tokens,
        units_left_out=encoded.units_left_out,
        seconds=seconds,
    )


def choose_units(units: Sequence[Unit], scores: np.ndarray, encoded: Encoded, selection: Selection) -> list[int]:
    """Indices of the summary's units, in document order."""
    order = by_score(scores, encoded.unit_selectable)
    return choose(order, [unit.text for unit in units], [unit.length for unit in units], selection)
