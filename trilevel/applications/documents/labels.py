"""Oracle labels: which sentences, taken greedily, give the best ROUGE-1 + ROUGE-2 against the reference abstract."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from trilevel.applications.documents.units import words_of

# only this many sentences, the best by their own overlap, are tried at each step
NUM_CANDIDATES = 200

_Counts = tuple[Counter[str], Counter[tuple[str, str]], int]


def _counts(text: str) -> _Counts:
    words = words_of(text)
    return Counter(words), Counter(pairwise(words)), len(words)


def _f1(ones: int, twos: int, length: int, reference: int) -> float:
    """ROUGE-1 F1 + ROUGE-2 F1 from the number of shared words and bigrams."""
    return 2 * ones / max(1, length + reference) + 2 * twos / max(1, length + reference - 2)


def oracle(sentences: Sequence[str], abstract: str, allowed: Sequence[bool] | None = None) -> list[int]:
    """Indices, in document order, of the greedy choice; it stops when no sentence raises ROUGE-1 + ROUGE-2 F1.

    Counts, not sets, are compared: a word counts as often as both texts hold it. Source: the greedy oracle of
    SummaRuNNer, arXiv:1611.04230, with F1 in place of recall.
    """
    counts = [_counts(sentence) for sentence in sentences]
    reference = _counts(abstract)
    indices = [i for i, c in enumerate(counts) if c[2] and (allowed is None or allowed[i])]
    indices.sort(key=lambda i: -(counts[i][0] & reference[0]).total() - 2 * (counts[i][1] & reference[1]).total())
    return _greedy(counts, reference, indices[:NUM_CANDIDATES])


def _greedy(counts: list[_Counts], reference: _Counts, candidates: list[int]) -> list[int]:
    # what the reference still lacks: shared counts then need no sum with the choice so far
    missing1, missing2 = reference[0].copy(), reference[1].copy()
    ones = twos = length = 0
    best, chosen = 0.0, list[int]()
    while True:
        gain: tuple[float, int, int, int] | None = None
        for i in candidates:
            if i in chosen:
                continue
            a = ones + (counts[i][0] & missing1).total()
            b = twos + (counts[i][1] & missing2).total()
            score = _f1(a, b, length + counts[i][2], reference[2])
            if score > best and (gain is None or score > gain[0]):
                gain = (score, i, a, b)
        if gain is None:
            return sorted(chosen)
        best, i, ones, twos = gain
        chosen.append(i)
        length += counts[i][2]
        missing1 -= counts[i][0]
        missing2 -= counts[i][1]


def sentence_gains(sentences: Sequence[str], abstract: str) -> np.ndarray:
    """ROUGE-1 + ROUGE-2 F1 of every sentence alone against the abstract, (sentences,) float32."""
    reference = _counts(abstract)
    gains = np.zeros(len(sentences), dtype=np.float32)
    for i, sentence in enumerate(sentences):
        ones, twos, length = _counts(sentence)
        gains[i] = _f1((ones & reference[0]).total(), (twos & reference[1]).total(), length, reference[2])
    return gains
