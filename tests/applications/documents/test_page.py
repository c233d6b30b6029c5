"""The page's content: tokens find their place in the text, and what was global is marked with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.applications.documents.demo_model import document, save_small_model
from trilevel.applications.documents.checkpoint import load_run
from trilevel.applications.documents.encoded import encode
from trilevel.applications.documents.page import look, pieces, token_spans, unit_views
from trilevel.applications.documents.passes import prepare
from trilevel.applications.documents.units import split_units
from trilevel.data.documents import Document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"))


def test_spans_cover_the_words_of_each_unit(folder: Path) -> None:
    _, tokenizer = load_run(folder)
    given = Document(id="x", title="Ünïcode ﬁt", text="# Heading ONE\nThe “quick” brówn fox 多级 jumps.")
    units = split_units(given)
    encoded = encode(units, tokenizer)
    spans = token_spans(tokenizer, units, encoded)
    assert len(spans) == encoded.num_tokens
    for index, unit in enumerate(units):
        covered = {c for place in np.flatnonzero(encoded.unit_ids == index) for c in range(*spans[place])}
        assert {c for c, sign in enumerate(unit.text) if not sign.isspace()} <= covered


def test_spans_stop_where_a_long_unit_is_cut(folder: Path) -> None:
    _, tokenizer = load_run(folder)
    units = split_units(Document(id="x", title="", text="attention " * 90 + "\n" + "Last one here now."))
    encoded = encode(units, tokenizer)
    assert len(token_spans(tokenizer, units, encoded)) == encoded.num_tokens


def test_global_tokens_are_marked_where_they_stand(folder: Path) -> None:
    model, tokenizer = load_run(folder)
    units = split_units(document())
    encoded = encode(units, tokenizer)
    seen = look(model, tokenizer, units, encoded)
    np.testing.assert_array_equal(seen.scores, prepare(model, encoded, "trilevel")())
    positions = [token.position for token in seen.global_tokens]
    assert positions == sorted(positions)
    # five a layer; titles and headings have the larger prior
    assert 5 <= len(positions) <= 10
    assert {token.prior for token in seen.global_tokens} <= {0.0, 1.0, 2.0}
    assert max(token.prior for token in seen.global_tokens) == 2.0
    assert {layer for token in seen.global_tokens for layer in token.layers} == {1, 2}
    views = unit_views(
        units,
        encoded,
        token_spans(tokenizer, units, encoded),
        chosen=[3, 5],
        scores=seen.scores,
        global_tokens=seen.global_tokens,
    )
    assert [view.text for view in views] == [unit.text for unit in units]
    assert [index for index, view in enumerate(views) if view.is_chosen] == [3, 5]
    marked = [piece for view in views for piece in view.pieces if piece.reason]
    assert [piece.text for piece in marked] == [token.text for token in seen.global_tokens if token.text.strip()]


def test_maps_show_token_and_sentence_layers(folder: Path) -> None:
    model, tokenizer = load_run(folder)
    units = split_units(document())
    seen = look(model, tokenizer, units, encode(units, tokenizer))
    names = [(shown.layer, shown.element) for shown in seen.level_maps]
    assert dict.fromkeys(names) == dict.fromkeys(
        [("Tokens, layer 1", "token"), ("Tokens, layer 2", "token"), ("Sentences, layer 1", "sentence")]
    )
    assert len(names) == 9
    for shown in seen.level_maps:
        np.testing.assert_allclose(shown.mass.sum(1), 1.0, atol=1e-4)


def test_a_dense_model_has_nothing_to_show(folder: Path) -> None:
    model, tokenizer = load_run(folder)
    units = split_units(document())
    seen = look(model.dense().eval(), tokenizer, units, encode(units, tokenizer))
    assert seen.level_maps == ()
    assert seen.global_tokens == ()


def test_pieces_join_to_the_text() -> None:
    text = "several marked words"
    found = pieces(text, [(8, 14, "a"), (0, 7, "b"), (10, 16, "overlaps"), (3, 3, "empty")])
    assert "".join(piece.text for piece in found) == text
    assert [(piece.text, piece.reason) for piece in found if piece.reason] == [("several", "b"), ("marked", "a")]
