"""ROUGE as the library counts it, and the paired bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from trilevel.applications.documents.rouge import bootstrap_mean, bootstrap_ratio, rouge
from trilevel.errors import ConfigError


def test_english_equals_the_library_with_its_own_words() -> None:
    reference = "The heads summarised regions of long documents. Windows are cheap."
    summary = ["Heads summarising a region are cheap.", "The window of the document."]
    scores = RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True).score(
        "The heads summarised regions of long documents.\nWindows are cheap.", "\n".join(summary)
    )
    expected = [100 * scores[kind].fmeasure for kind in ("rouge1", "rouge2", "rougeLsum")]
    assert rouge(reference, summary) == pytest.approx(expected)


def test_chinese_is_scored_by_character() -> None:
    one, two, longest = rouge("多级注意力。", ["多级注意力。"])
    assert (one, two, longest) == (100.0, 100.0, 100.0)
    assert rouge("多级", ["级多"])[0] == 100.0
    assert rouge("多级", ["级多"])[1] == 0.0


def test_an_empty_summary_scores_nothing() -> None:
    assert rouge("words here", []) == (0.0, 0.0, 0.0)


def test_ratio_of_equal_systems_is_one() -> None:
    scores = np.random.default_rng(0).uniform(1, 2, 31)
    ratio = bootstrap_ratio(scores, scores)
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_pairing_makes_the_interval_narrow() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(10, 50, 211)
    paired = bootstrap_ratio(base * 1.02, base)
    assert paired.value == pytest.approx(1.02)
    assert paired.high - paired.low < 1e-9
    shuffled = bootstrap_ratio(rng.permutation(base) * 1.02, base)
    assert shuffled.high - shuffled.low > 0.05


def test_interval_holds_the_mean() -> None:
    scores = np.random.default_rng(0).normal(30, 5, 97)
    low, high = bootstrap_mean(scores)
    assert low < scores.mean() < high


def test_different_documents_are_refused() -> None:
    with pytest.raises(ConfigError, match="same documents"):
        bootstrap_ratio(np.ones(3), np.ones(5))
