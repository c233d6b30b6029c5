"""Units and their features."""

from __future__ import annotations

import numpy as np

from trilevel.applications.documents.units import (
    FEATURE_SIZES,
    HEADING_PRIOR,
    LEAD_PRIOR,
    Kind,
    features,
    selectable,
    split_units,
    words_of,
)
from trilevel.data.documents import Document


def test_units_in_order(document: Document) -> None:
    units = split_units(document)
    kinds = [unit.kind for unit in units]
    assert kinds[:2] == [Kind.TITLE, Kind.HEADING]
    assert [unit.text for unit in units if unit.kind == Kind.HEADING] == ["Motivation", "Local level", "Regional level"]
    assert [unit.text for unit in units if unit.kind == Kind.ITEM][1] == "- short item"
    assert [unit.section for unit in units] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert [unit.in_section for unit in units if unit.kind >= Kind.SENTENCE] == [0, 1, 2, 0, 1, 2, 3, 0]


def test_priors_titles_headings_and_lead_sentences(document: Document) -> None:
    priors = [unit.prior for unit in split_units(document)]
    assert priors == [
        HEADING_PRIOR,
        HEADING_PRIOR,
        LEAD_PRIOR,
        0,
        0,
        HEADING_PRIOR,
        LEAD_PRIOR,
        0,
        0,
        0,
        2.0,
        LEAD_PRIOR,
    ]


def test_sentences_of_four_words_can_be_chosen(document: Document) -> None:
    units = split_units(document)
    mask = selectable(units)
    assert [unit.text for unit, kept in zip(units, mask, strict=True) if not kept] == [
        "Levels of attention", "Motivation", "This is slow.", "Local level", "They are cheap.", "- short item",
        "Regional level",
    ]  # fmt: skip


def test_one_word_and_a_title_alone_can_be_chosen() -> None:
    assert selectable(split_units(Document(id="", title="", text="word"))).tolist() == [True]
    assert selectable(split_units(Document(id="", title="Title", text="# Heading"))).tolist() == [True, True]


def test_features_stay_in_their_tables(document: Document) -> None:
    for text in (document.text, "word", "x. " * 3_001, "# A\n" * 211 + "b", "字。" * 503, "a" * 100_003):
        found = features(split_units(Document(id="", title="A title of levels", text=text)))
        assert found.shape[1] == len(FEATURE_SIZES)
        assert (found >= 0).all()
        assert (found < np.array(FEATURE_SIZES)).all()


def test_overlap_with_title_and_heading(document: Document) -> None:
    overlap = features(split_units(document))[:, 8]
    # "attention" is in the title, and nothing of the heading "Motivation" is in the sentence
    assert overlap[2] == 1
    assert overlap[3] == 0


def test_centrality_puts_common_words_above_rare_ones() -> None:
    text = "\n".join(["Long documents need cheap attention heads."] * 5 + ["Zebras drink lemonade quietly tonight."])
    centrality = features(split_units(Document(id="", title="", text=text)))[:, 9]
    assert centrality[-1] == centrality.min()


def test_a_long_run_without_spaces_counts_by_its_characters() -> None:
    unit = split_units(Document(id="", title="", text="a" * 400))[0]
    assert (unit.words, unit.length) == (1, 20)


def test_words_of() -> None:
    assert words_of("Don't use PEP-484, 多级!") == ["don", "t", "use", "pep", "484", "多", "级"]
