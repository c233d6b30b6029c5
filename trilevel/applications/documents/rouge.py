"""ROUGE-1/2/L of a summary, by `rouge-score`, and paired bootstrap ratios between two ways to summarise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from trilevel.applications.documents.units import words_of
from trilevel.data.sentences import split_sentences
from trilevel.errors import ConfigError, require

KINDS = ("rouge1", "rouge2", "rougeLsum")
_ASCII = re.compile(r"[a-z0-9]+")


class _Words:
    """Words as `rouge-score` has them (lower case, Porter stems above three letters) plus single CJK characters."""

    def __init__(self) -> None:
        self._stem = require("nltk.stem.porter", extra="documents").PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        return [self._stemmed(word) for word in words_of(text)]

    @cache  # noqa: B019 - one scorer lives as long as the process
    def _stemmed(self, word: str) -> str:
        return str(self._stem(word)) if len(word) > 3 and _ASCII.fullmatch(word) else word


@cache
def _scorer() -> Any:
    module = require("rouge_score.rouge_scorer", extra="documents")
    return module.RougeScorer(list(KINDS), tokenizer=_Words())


def rouge(reference: str, summary: Sequence[str]) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (summary level: one sentence a line) F1, 0 to 100.

    Raises:
        MissingExtraError: `rouge-score` is not installed (extra `documents`).
    """
    lines = [sentence for line in reference.split("\n") if line.strip() for sentence in split_sentences(line)]
    scores = _scorer().score("\n".join(lines), "\n".join(summary))
    one, two, longest = (100.0 * scores[kind].fmeasure for kind in KINDS)
    return one, two, longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A ratio of two means over the same documents, with its 95% interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(scores: np.ndarray, *, resamples: int = 2_000, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean over documents; `scores` (documents,)."""
    means = np.array([scores[rows].mean() for rows in _resampled(len(scores), resamples, seed)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_ratio(ours: np.ndarray, theirs: np.ndarray, *, resamples: int = 2_000, seed: int = 0) -> Ratio:
    """mean(ours) / mean(theirs) over documents, (documents,) each, paired: both are drawn from the same documents.

    Raises:
        ConfigError: the two do not cover the same number of documents.
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise ConfigError(
            f"shapes {ours.shape} and {theirs.shape}: one score for each of the same documents is needed."
        )
    value = _divide(ours.mean(), theirs.mean())
    ratios = [_divide(ours[rows].mean(), theirs[rows].mean()) for rows in _resampled(len(ours), resamples, seed)]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(value=value, low=float(low), high=float(high))


def _divide(a: float, b: float) -> float:
    # two methods that both score nothing are equal
    return float(a / b) if b > 0 else (1.0 if a == b else float("inf"))


def _resampled(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))
