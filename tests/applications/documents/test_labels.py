"""The greedy oracle against a slow one written from its docstring."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from trilevel.applications.documents.labels import oracle, sentence_gains
from trilevel.applications.documents.units import words_of

WORDS = ("level", "head", "token", "region", "window", "local", "sum", "model")


def score(sentences: list[str], reference: str) -> float:
    """ROUGE-1 F1 + ROUGE-2 F1 with counts; bigrams never span two sentences."""
    r = words_of(reference)
    one: Counter[str] = Counter()
    two: Counter[tuple[str, str]] = Counter()
    for sentence in sentences:
        words = words_of(sentence)
        one.update(words)
        two.update(pairwise(words))
    length = one.total()
    shared1, shared2 = (one & Counter(r)).total(), (two & Counter(pairwise(r))).total()
    return 2 * shared1 / max(1, length + len(r)) + 2 * shared2 / max(1, length + len(r) - 2)


def slow_oracle(sentences: list[str], reference: str) -> list[int]:
    chosen: list[int] = []
    best = 0.0
    while True:
        rest = [i for i in range(len(sentences)) if i not in chosen]
        gains = [(score([sentences[j] for j in [*chosen, i]], reference), -i) for i in rest]
        if not gains or max(gains)[0] <= best:
            return sorted(chosen)
        best, index = max(gains)
        chosen.append(-index)


@pytest.mark.parametrize("seed", range(7))
def test_greedy_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sentences = [" ".join(rng.choice(WORDS, size=int(rng.integers(2, 7)))) for _ in range(11)]
    reference = " ".join(rng.choice(WORDS, size=13))
    fast = oracle(sentences, reference)
    assert score([sentences[i] for i in fast], reference) == pytest.approx(
        score([sentences[i] for i in slow_oracle(sentences, reference)], reference)
    )


def test_nothing_shared_gives_nothing() -> None:
    assert oracle(["one two", "three"], "alpha beta") == []
    assert oracle([], "alpha") == []
    assert oracle(["...", ""], "alpha") == []


def test_only_allowed_sentences() -> None:
    assert oracle(["alpha beta", "alpha beta gamma"], "alpha beta gamma", [True, False]) == [0]


def test_gains() -> None:
    gains = sentence_gains(["alpha beta", "none", ""], "alpha beta")
    assert gains.tolist() == [2.0, 0.0, 0.0]
