"""Lead, Random, LexRank and TextRank rank every sentence once, and rankings are kept."""

from __future__ import annotations

import numpy as np
import pytest

from trilevel.applications.documents import baselines
from trilevel.data.places import cache_dir
from trilevel.errors import MissingExtraError

SENTENCES = [
    "Attention over long documents is expensive.",
    "Cats sleep.",
    "Long documents need cheap attention over all documents.",
    "Cheap attention helps long documents.",
    "Cats sleep.",
    "...",
]

pytest.importorskip("sumy", reason="needs the extra `baselines`")


@pytest.mark.parametrize("name", list(baselines.RANKINGS))
def test_a_ranking_holds_every_sentence_once(name: str) -> None:
    assert sorted(baselines.RANKINGS[name](SENTENCES)) == list(range(len(SENTENCES)))
    assert baselines.RANKINGS[name]([]) == []
    assert baselines.RANKINGS[name](["One sentence stands alone."]) == [0]


@pytest.mark.parametrize("name", ["lexrank", "textrank"])
def test_ratings_are_those_of_sumy_itself(name: str) -> None:
    from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence
    from sumy.nlp.stemmers import Stemmer
    from sumy.summarizers.lex_rank import LexRankSummarizer
    from sumy.summarizers.text_rank import TextRankSummarizer
    from sumy.utils import get_stop_words

    summarizer = {"lexrank": LexRankSummarizer, "textrank": TextRankSummarizer}[name](Stemmer("english"))
    summarizer.stop_words = get_stop_words("english")
    sentences = [Sentence(s, baselines._Words()) for s in SENTENCES[:4]]
    best = summarizer(ObjectDocumentModel([Paragraph(sentences)]), 2)
    assert {str(s) for s in best} == {SENTENCES[i] for i in baselines.RANKINGS[name](SENTENCES[:4])[:2]}


def test_a_central_sentence_beats_a_lonely_one() -> None:
    for name in ("lexrank", "textrank"):
        assert baselines.RANKINGS[name](SENTENCES[:4])[0] != 1


def test_rankings_are_read_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    first = baselines.lexrank(SENTENCES)
    assert len(list((cache_dir() / "rankings" / "lexrank").glob("*.json"))) == 1
    monkeypatch.setattr(baselines, "_by_sumy", lambda *_: pytest.fail("ranked again"))
    assert baselines.lexrank(SENTENCES) == first


def test_random_depends_on_the_seed_alone() -> None:
    assert baselines.random(SENTENCES) == baselines.random(SENTENCES)
    orders = {tuple(baselines.random(SENTENCES, seed=seed)) for seed in range(11)}
    assert len(orders) > 5


def test_missing_sumy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sumy.summarizers.lex_rank", None)
    with pytest.raises(MissingExtraError, match=r"trilevel\[baselines\]"):
        baselines.lexrank(SENTENCES)


def test_lead() -> None:
    assert baselines.lead(SENTENCES) == list(np.arange(6))
