"""Budget, redundancy, order."""

from __future__ import annotations

import numpy as np
import pytest

from trilevel.applications.documents.select import Selection, by_score, choose
from trilevel.errors import ConfigError

TEXTS = ["alpha beta gamma delta", "alpha beta gamma delta", "one two three", "four five", "six seven eight nine ten"]
LENGTHS = [4, 4, 3, 2, 5]


def test_order_of_the_document_and_number_of_sentences() -> None:
    assert choose([4, 0, 2], TEXTS, LENGTHS, Selection(sentences=2)) == [0, 4]
    assert choose([4], TEXTS, LENGTHS, Selection(sentences=3)) == [4]


def test_words_pass_over_or_end() -> None:
    order = [2, 4, 3]
    assert choose(order, TEXTS, LENGTHS, Selection(words=5)) == [2, 3]
    assert choose(order, TEXTS, LENGTHS, Selection(words=5, skip_long=False)) == [2]


def test_the_first_sentence_always_fits() -> None:
    assert choose([4, 3], TEXTS, LENGTHS, Selection(words=1)) == [4]


def test_repeats_are_passed_over() -> None:
    assert choose([0, 1, 2], TEXTS, LENGTHS, Selection(sentences=2)) == [0, 2]
    assert choose([0, 1, 2], TEXTS, LENGTHS, Selection(sentences=2, max_overlap=1.0)) == [0, 1]


def test_scores_rank_with_ties_by_position_and_nan_last() -> None:
    scores = np.array([1.0, np.nan, 3.0, 3.0, 9.0])
    assert by_score(scores, np.array([True, True, True, True, False])) == [2, 3, 0, 1]


def test_messages() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        Selection()
    with pytest.raises(ConfigError, match="exactly one"):
        Selection(words=3, sentences=3)
    with pytest.raises(ConfigError, match="at least 1"):
        Selection(words=0)
    with pytest.raises(ConfigError, match="max_overlap=2"):
        Selection(words=3, max_overlap=2.0)
