"""Units of a document: its title, its headings and its sentences, in order, with what is known about each."""

from __future__ import annotations

import enum
import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from trilevel.data.documents import Document
from trilevel.data.sentences import count_words, is_chinese, split_sentences

# a stored corpus or label file made by another version is made anew
UNITS_VERSION = 3
MIN_SELECTABLE_WORDS = 4
MAX_HEADING_CHARACTERS = 300
HEADING_PRIOR = 2.0
LEAD_PRIOR = 1.0

_TOKEN = re.compile(r"[a-z0-9]+|[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")
_ITEM = re.compile(r"(?:[-*+\u2022]|\d{1,3}[.)])\s")


class Kind(enum.IntEnum):
    """What a unit is."""

    TITLE = 0
    HEADING = 1
    SENTENCE = 2
    ITEM = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit: its text and its place; `section` counts headings so far, the `in_` fields sentences."""

    text: str
    kind: Kind
    level: int
    section: int
    in_section: int
    in_paragraph: int
    words: int

    @property
    def is_selectable(self) -> bool:
        """True if a summary may use this unit."""
        return self.kind >= Kind.SENTENCE and self.words >= MIN_SELECTABLE_WORDS

    @property
    def length(self) -> int:
        """What it takes from a budget of words: its words, or one for every 20 characters where those are more."""
        return max(self.words, len(self.text) // 20)

    @property
    def prior(self) -> float:
        """What is added to the score of its tokens when global tokens are chosen."""
        if self.kind <= Kind.HEADING:
            return HEADING_PRIOR
        return LEAD_PRIOR if self.in_section == 0 else 0.0


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers; CJK characters one by one.

    >>> words_of("Levels of 多级, v2")
    ['levels', 'of', '多', '级', 'v2']
    """
    return _TOKEN.findall(text.lower())


def split_units(document: Document) -> list[Unit]:
    """Title (where there is one), then headings and sentences in order."""
    chinese = is_chinese(document.text)
    units: list[Unit] = []
    section = in_section = 0
    if document.title.strip():
        units.append(_unit(document.title.strip()[:MAX_HEADING_CHARACTERS], Kind.TITLE))
    for line in document.text.split("\n"):
        line = line.strip()
        if line.startswith("#"):
            section, in_section = section + 1, 0
            level = len(line) - len(line.lstrip("#"))
            words = line.lstrip("# ")[:MAX_HEADING_CHARACTERS]
            if words:
                units.append(_unit(words, Kind.HEADING, level=min(level, 6), section=section))
            continue
        kind = Kind.ITEM if _ITEM.match(line) else Kind.SENTENCE
        for number, sentence in enumerate(split_sentences(line, chinese=chinese) if line else []):
            units.append(_unit(sentence, kind, section=section, in_section=in_section, in_paragraph=number))
            in_section += 1
    return units


def _unit(text: str, kind: Kind, level: int = 0, section: int = 0, in_section: int = 0, in_paragraph: int = 0) -> Unit:
    return Unit(
        text=text,
        kind=kind,
        level=level,
        section=section,
        in_section=in_section,
        in_paragraph=in_paragraph,
        words=count_words(text),
    )


def selectable(units: list[Unit]) -> np.ndarray:
    """Which units a summary may use, (units,) bool: sentences of four words, else any sentence, else any unit."""
    for rule in (lambda u: u.is_selectable, lambda u: u.kind >= Kind.SENTENCE, lambda u: True):
        mask = np.array([rule(unit) for unit in units], dtype=bool)
        if mask.any():
            break
    return mask


# number of buckets of each feature, in the order of `features`
FEATURE_SIZES = (4, 16, 16, 10, 12, 6, 14, 7, 8, 12, 8)


def features(units: list[Unit]) -> np.ndarray:
    """Buckets of what is known about each unit, (units, 11) int64, column f below `FEATURE_SIZES[f]`.

    Columns: kind; index and relative index; index in the section; number of the section; index in the paragraph;
    length; heading level; overlap with the title and the headings' words; centrality (cosine with the
    document's words, as a quantile); length of the document.
    """
    total = len(units)
    bags = [Counter(words_of(unit.text)) for unit in units]
    overlap, centrality = _overlap(units, bags), _centrality(bags)
    rows = [
        (
            int(unit.kind),
            _log_bucket(index, 16),
            min(15, 16 * index // max(1, total)),
            _log_bucket(unit.in_section, 10),
            _log_bucket(unit.section, 12),
            min(5, unit.in_paragraph),
            _log_bucket(unit.words, 14),
            unit.level,
            overlap[index],
            centrality[index],
            min(7, max(0, int(math.log2(max(1, total))) - 3)),
        )
        for index, unit in enumerate(units)
    ]
    return np.array(rows, dtype=np.int64).reshape(total, len(FEATURE_SIZES))


def _log_bucket(value: int, size: int) -> int:
    """0, 1, 2, 3 by themselves, then two buckets for each doubling."""
    bucket = value if value < 4 else int(2 * math.log2(value))
    return min(size - 1, bucket)


def _overlap(units: list[Unit], bags: list[Counter[str]]) -> list[int]:
    """How many different words a unit shares with the title, 0-3, plus 4 if it shares two with its heading."""
    title: set[str] = set()
    heading: set[str] = set()
    found = []
    for unit, bag in zip(units, bags, strict=True):
        words = {word for word in bag if len(word) > 3 or word > "\u2e7f"}
        if unit.kind == Kind.TITLE:
            title = words
        elif unit.kind == Kind.HEADING:
            heading = words
        found.append(min(3, len(words & title)) + 4 * (len(words & heading) >= 2))
    return found


def _centrality(bags: list[Counter[str]]) -> list[int]:
    """Cosine of a unit's words with the document's, by document-wide frequency damped by the root; a quantile 0-11."""
    if not bags:
        return []
    document: Counter[str] = Counter()
    for bag in bags:
        document.update(bag.keys())
    total = len(bags)
    weight = {word: math.log1p(total / count) for word, count in document.items()}
    centre = {word: count * weight[word] for word, count in document.items()}
    scores = []
    for bag in bags:
        norm = math.sqrt(sum((weight[word] * count) ** 2 for word, count in bag.items()))
        scores.append(sum(weight[word] * count * centre[word] for word, count in bag.items()) / norm if norm else 0.0)
    ranks = np.argsort(np.argsort(np.array(scores), kind="stable"), kind="stable")
    return [int(rank * 12 // total) for rank in ranks]
