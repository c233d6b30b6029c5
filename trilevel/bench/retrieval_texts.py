"""The texts of `trilevel bench retrieval`: documents with abstracts, pairs of neighbouring sentences, paragraphs.

Everything follows from the data sets' test splits alone: no draw, no seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from trilevel.applications.documents.recipe import data_path
from trilevel.data.documents import Document, load_jsonl
from trilevel.data.sentences import split_sentences

SETS = ("tech", "pmc")
MIN_WORDS, MAX_WORDS = 8, 60
"""Of a sentence in a pair."""

MIN_PARAGRAPH_WORDS = 30
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two neighbouring sentences of a section, and which document they are from."""

    document: int
    first: str
    second: str


def load_set(name: str, *, data: Path | None = None, most: int | None = None) -> list[Document]:
    """The test split of a set, all of its documents that have an abstract or `most` spread evenly over them.

    Raises:
        InputError: the data is not there.
    """
    documents = load_jsonl(data_path(f"docs/{name}.jsonl.xz", data), split="test")
    return spread([document for document in documents if document.abstract.strip()], most)


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """All items, or `most` of them at equal distances.

    >>> spread("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    if most is None or most >= len(items):
        return list(items)
    return [items[place * len(items) // most] for place in range(most)]


def sections(text: str) -> list[list[str]]:
    r"""Paragraphs by section: a line that begins with `#` opens one.

    >>> sections("# A\nfirst\n# B\n# C\nsecond\nthird")
    [['first'], ['second', 'third']]
    """
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.startswith("#"):
            found.append([])
        elif line.strip():
            found[-1].append(line.strip())
    return [section for section in found if section]


def sentence_pairs(documents: Sequence[Document], *, per_document: int) -> list[Pair]:
    """The first two neighbouring sentences of 8 to 60 words of a paragraph, from sections spread over each document."""
    found: list[Pair] = []
    for place, document in enumerate(documents):
        own = [pair for section in sections(document.text) if (pair := _first_pair(section)) is not None]
        found += [Pair(document=place, first=first, second=second) for first, second in spread(own, per_document)]
    return found


def _first_pair(section: Sequence[str]) -> tuple[str, str] | None:
    for paragraph in section:
        for first, second in pairwise(split_sentences(paragraph)):
            if all(MIN_WORDS <= len(sentence.split()) <= MAX_WORDS for sentence in (first, second)):
                return first, second
    return None


def paragraphs(documents: Sequence[Document], *, per_document: int) -> list[str]:
    """Paragraphs of 30 words and more, spread over each document."""
    found: list[str] = []
    for document in documents:
        own = [p for section in sections(document.text) for p in section if len(p.split()) >= MIN_PARAGRAPH_WORDS]
        found += spread(own, per_document)
    return found
