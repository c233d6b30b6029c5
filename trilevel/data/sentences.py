"""Sentences of English and Chinese text, by the library `sentencex`, and the length of a text in words."""

from __future__ import annotations

import re

from trilevel.errors import require

# han, kana and hangul: scripts without spaces between words, counted by character
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af]")
MAX_SENTENCE_CHARACTERS = 1_000


def is_chinese(text: str) -> bool:
    """True if at least a fifth of the first 4,000 characters that are not spaces are CJK characters."""
    sample = "".join(text[:4_000].split())
    return bool(sample) and len(_CJK.findall(sample)) >= 0.2 * len(sample)


def count_words(text: str) -> int:
    """Number of words between spaces, with every CJK character counted as a word.

    >>> count_words("levels of attention"), count_words("多级 attention")
    (3, 3)
    """
    return len(_CJK.sub(" \u4e00 ", text).split()) if _CJK.search(text) else len(text.split())


def split_sentences(text: str, *, chinese: bool | None = None) -> list[str]:
    """Sentences of one paragraph; a sentence over 1,000 characters is cut into pieces of at most that.

    Raises:
        MissingExtraError: `sentencex` is not installed (extra `documents`).
    """
    chinese = is_chinese(text) if chinese is None else chinese
    segment = require("sentencex", extra="documents").segment
    found: list[str] = []
    for sentence in segment("zh" if chinese else "en", text):
        found.extend(_pieces(sentence.strip()))
    return found


def _pieces(sentence: str) -> list[str]:
    pieces: list[str] = []
    start = 0
    while len(sentence) - start > MAX_SENTENCE_CHARACTERS:
        # cut at the last space of the piece where there is one in its second half
        end = sentence.rfind(" ", start + MAX_SENTENCE_CHARACTERS // 2, start + MAX_SENTENCE_CHARACTERS)
        end = end if end > 0 else start + MAX_SENTENCE_CHARACTERS
        pieces.append(sentence[start:end].strip())
        start = end
    pieces.append(sentence[start:].strip())
    return [piece for piece in pieces if piece]
