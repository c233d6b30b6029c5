"""What a summary is, and how one is chosen once units have scores; numpy alone, as where artifacts run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trilevel.applications.documents.encoded import Encoded, encode
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


def selection_of(
    *, num_sentences: int | None = None, budget_words: int | None = None, max_overlap: float = 0.5
) -> Selection:
    """The budget of a summary; 59 words when none is given.

    Raises:
        ConfigError: both budgets are given, or one is below 1.
    """
    words = DEFAULT_BUDGET_WORDS if num_sentences is None and budget_words is None else budget_words
    return Selection(words=words, sentences=num_sentences, max_overlap=max_overlap)


def summary_of(
    document: Document,
    tokenizer: DocumentTokenizer,
    score: Callable[[Encoded], np.ndarray],
    selection: Selection,
    *,
    max_tokens: int,
) -> Summary:
    """The summary of a document by whatever gives its units scores, (units,).

    Raises:
        InputError: the document has no word.
    """
    units = split_units(document)
    encoded = encode(units, tokenizer, max_tokens=max_tokens)
    start = time.perf_counter()
    scores = score(encoded)
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
