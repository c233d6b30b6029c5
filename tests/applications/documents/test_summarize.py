"""A summary from a document, in both languages and at the edges."""

from __future__ import annotations

import numpy as np
import pytest

from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.summarize import summarize
from trilevel.applications.documents.summary import DEFAULT_BUDGET_WORDS
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.data.documents import Document
from trilevel.errors import ConfigError, InputError


def test_sentences_come_in_order_and_fit(
    model: DocumentModel, tokenizer: DocumentTokenizer, document: Document
) -> None:
    summary = summarize(model, tokenizer, document, num_sentences=3)
    assert len(summary.sentences) == 3
    assert summary.indices == sorted(summary.indices)
    assert [summary.units[i].text for i in summary.indices] == summary.sentences
    assert summary.scores.shape == (len(summary.units),)
    best = summary.scores[[u.is_selectable for u in summary.units]].max()
    assert best in summary.scores[summary.indices]


def test_budgets_of_words(model: DocumentModel, tokenizer: DocumentTokenizer, document: Document) -> None:
    short = summarize(model, tokenizer, document, budget_words=15)
    assert sum(summary_words(s) for s in short.sentences) <= 15
    default = summarize(model, tokenizer, document)
    assert sum(summary_words(s) for s in default.sentences) <= DEFAULT_BUDGET_WORDS
    with pytest.raises(ConfigError, match="exactly one"):
        summarize(model, tokenizer, document, num_sentences=1, budget_words=1)
    with pytest.raises(ConfigError, match="at least 1"):
        summarize(model, tokenizer, document, num_sentences=0)


def summary_words(sentence: str) -> int:
    return len(sentence.split())


def test_one_word_is_its_own_summary(model: DocumentModel, tokenizer: DocumentTokenizer) -> None:
    assert summarize(model, tokenizer, Document(id="", title="", text="word")).sentences == ["word"]


def test_chinese(model: DocumentModel, tokenizer: DocumentTokenizer) -> None:
    text = "多级注意力机制把注意力头分为三级。局部头只看附近的词元。区域头看每个区域的摘要。全局头看少数被选中的词元。"
    summary = summarize(model, tokenizer, Document(id="", title="多级注意力", text=text), num_sentences=2)
    assert len(summary.sentences) == 2
    assert all(sentence in text for sentence in summary.sentences)


def test_a_document_over_the_limit_says_what_was_left_out(
    model: DocumentModel, tokenizer: DocumentTokenizer, document: Document
) -> None:
    summary = summarize(model, tokenizer, document, max_tokens=41)
    assert summary.num_tokens <= 41
    assert summary.units_left_out > 0
    assert len(summary.scores) == len(summary.units)


def test_one_huge_line(model: DocumentModel, tokenizer: DocumentTokenizer) -> None:
    summary = summarize(model, tokenizer, Document(id="", title="", text="a" * 100_003), max_tokens=2_003)
    assert len(summary.sentences) == 1
    assert summary.units_left_out > 0


def test_focus_and_mode(model: DocumentModel, tokenizer: DocumentTokenizer, document: Document) -> None:
    model.train()
    summary = summarize(model, tokenizer, document, num_sentences=2, focus_fraction=0.4)
    assert len(summary.sentences) == 2
    assert model.training
    again = summarize(model, tokenizer, document, num_sentences=2, focus_fraction=0.4)
    assert np.array_equal(summary.scores, again.scores)


def test_nothing_to_summarise(model: DocumentModel, tokenizer: DocumentTokenizer) -> None:
    with pytest.raises(InputError, match="at least one word"):
        summarize(model, tokenizer, Document(id="", title="", text=" \n"))
