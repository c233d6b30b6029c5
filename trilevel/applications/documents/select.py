"""From scores to a summary: the best sentences that fit the budget and do not repeat each other, in document order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trilevel.applications.documents.units import words_of
from trilevel.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """How sentences are chosen: exactly one budget, `words` or `sentences`.

    A sentence is passed over when more than `max_overlap` of its bigrams are already in the summary (redundancy
    control in the way of trigram blocking, arXiv:1705.04304). With `words`, a sentence that does not fit is passed over
    when `skip_long`, else it ends the choice; the first one always fits.
    """

    words: int | None = None
    sentences: int | None = None
    max_overlap: float = 0.5
    skip_long: bool = True

    def __post_init__(self) -> None:
        """Check the budget."""
        if (self.words is None) == (self.sentences is None):
            raise ConfigError(f"words={self.words}, sentences={self.sentences}: give exactly one of the two budgets.")
        if (self.words or self.sentences or 0) < 1:
            raise ConfigError(f"words={self.words}, sentences={self.sentences}: a budget is at least 1.")
        if not 0.0 <= self.max_overlap <= 1.0:
            raise ConfigError(f"max_overlap={self.max_overlap} is not a share; give a number from 0 to 1.")


def choose(order: Sequence[int], texts: Sequence[str], lengths: Sequence[int], selection: Selection) -> list[int]:
    """Indices of the summary in document order, from candidates in `order` of falling score."""
    chosen: list[int] = []
    seen: set[tuple[str, str]] = set()
    used = 0
    for i in order:
        if selection.sentences is not None and len(chosen) >= selection.sentences:
            break
        if selection.words is not None and chosen and used + lengths[i] > selection.words:
            if selection.skip_long:
                continue
            break
        words = words_of(texts[i])
        bigrams = set(pairwise(words))
        if bigrams and len(bigrams & seen) > selection.max_overlap * len(bigrams):
            continue
        chosen.append(int(i))
        seen |= bigrams
        used += lengths[i]
        if selection.words is not None and used >= selection.words:
            break
    return sorted(chosen)


def by_score(scores: np.ndarray, mask: np.ndarray) -> list[int]:
    """Selectable indices by falling score, ties by position; a score that is not a number comes last."""
    candidates = np.flatnonzero(mask)
    ranked = np.nan_to_num(scores[candidates], nan=-np.inf)
    return [int(i) for i in candidates[np.argsort(-ranked, kind="stable")]]
