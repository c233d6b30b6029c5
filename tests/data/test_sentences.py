"""Sentences of English and Chinese, and lines that are no sentences."""

from __future__ import annotations

import time

import pytest

from trilevel.data.sentences import MAX_SENTENCE_CHARACTERS, count_words, is_chinese, split_sentences
from trilevel.errors import MissingExtraError


def test_english_and_chinese() -> None:
    assert split_sentences("Use e.g. this one. See PEP 8. Is it?") == ["Use e.g. this one.", "See PEP 8.", "Is it?"]
    assert split_sentences("这是第一句。这是第二句！是的；对。") == ["这是第一句。", "这是第二句！", "是的；对。"]


def test_chinese_is_told_by_the_share_of_its_characters() -> None:
    assert is_chinese("TiDB 数据库的配置参数")
    assert not is_chinese("The word 数据 once in an English sentence of this length.")
    assert not is_chinese("")


def test_words() -> None:
    assert count_words("two words") == 2
    assert count_words("多级 two words") == 4
    assert count_words("") == 0


@pytest.mark.parametrize("text", ["a" * 5_003, "word " * 1_009, "字" * 2_003])
def test_long_sentences_are_cut_and_nothing_is_lost(text: str) -> None:
    pieces = split_sentences(text)
    assert max(map(len, pieces)) <= MAX_SENTENCE_CHARACTERS
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")


def test_five_megabytes_without_a_space_are_quick() -> None:
    start = time.perf_counter()
    assert len(split_sentences("a" * 5_000_000)) == 5_000
    assert time.perf_counter() - start < 20


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencex", None)
    with pytest.raises(MissingExtraError, match=r"trilevel\[documents\]"):
        split_sentences("A text.")
