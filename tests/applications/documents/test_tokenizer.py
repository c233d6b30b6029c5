"""The tokenizer: any text, both languages, the same training twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilevel.applications.documents.checkpoint import shipped_tokenizer
from trilevel.applications.documents.tokenizer import PADDING_ID, DocumentTokenizer, load_tokenizer, train_tokenizer
from trilevel.errors import CheckpointError


def test_lower_case_and_both_languages(tokenizer: DocumentTokenizer) -> None:
    english, chinese = tokenizer.encode(["Multi-level Attention", "多级注意力机制"])
    assert tokenizer.decode(english).strip() == "multi-level attention"
    assert tokenizer.decode(chinese).strip() == "多级注意力机制"
    assert len(english) <= 5


TOKENIZER = shipped_tokenizer()


@given(st.text(max_size=50))
def test_any_text_has_tokens_within_the_vocabulary(text: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer.encode([text])[0]
    assert all(0 < i < tokenizer.vocab_size for i in ids)
    assert PADDING_ID not in ids


def test_training_twice_gives_the_same(tmp_path: Path) -> None:
    texts = ["levels of attention heads", "local and global heads", "多级注意力"] * 7
    one, two = (train_tokenizer(iter(texts), vocab_size=300) for _ in range(2))
    assert one.digest() == two.digest()
    one.save(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json").encode(texts) == two.encode(texts)


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_tokenizer(tmp_path / "bad.json")
