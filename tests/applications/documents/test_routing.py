"""Summarisers in segments: against the whole graph, padded and alone; documents as samples; what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.applications.documents.conftest import TEXT
from tests.applications.documents.tiny_encoder import save_pretrained, save_small_converted
from trilevel.applications.documents.artifact import graph_inputs
from trilevel.applications.documents.backbone import backbone_of
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.graph import ScoringGraph
from trilevel.applications.documents.model import DocumentConfig, DocumentModel
from trilevel.applications.documents.rouge import rouge
from trilevel.applications.documents.route_family import default_plan, make_document_family
from trilevel.applications.documents.routing import Row, collate, digest_of, judged, known_digests, length_of
from trilevel.applications.documents.segments import DocumentPaths
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.artifact.runtime.focus import LEAST_TOKENS, OUT
from trilevel.conversion.load import load_encoder
from trilevel.conversion.source import Source
from trilevel.data.documents import Document
from trilevel.errors import ConfigError, InputError


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return load_encoder(save_small_converted(tmp_path / "converted", save_pretrained(tmp_path / "pretrained", TEXT)))


@pytest.fixture
def model(source: Source) -> DocumentModel:
    torch.manual_seed(0)
    made = DocumentModel(DocumentConfig(tokens=backbone_of(source, word_dim=5, dim=24, num_heads=3)))
    torch.nn.init.normal_(made.score.weight)
    return made.attach(source.encoder).eval()


@pytest.fixture
def rows(source: Source, document: Document) -> list[Row]:
    tokenizer = DocumentTokenizer(source.tokenizer)
    documents = [document, replace(document, text="\n".join([TEXT] * 13)), replace(document, text=TEXT[300:])]
    return [Row(document=one, units=split_units(one), encoded=encode(split_units(one), tokenizer)) for one in documents]


def in_segments(model: DocumentModel, *, fraction: float = 0.2) -> DocumentPaths:
    assert model.encoder is not None
    bare = copy.deepcopy(model)
    bare.encoder = None
    return DocumentPaths(model.encoder, model.config.tokens, [bare, bare, bare], (1, 2), fraction).eval()  # type: ignore[arg-type]


def tensors(documents: list[Encoded]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in graph_inputs(documents).items()}


def test_all_segments_of_a_short_document_are_the_whole_graph(model: DocumentModel, rows: list[Row]) -> None:
    inputs = tensors([rows[0].encoded, rows[2].encoded])
    scores = in_segments(model)(inputs)
    with torch.no_grad():
        whole = ScoringGraph(model)(*inputs.values())
    real = rows[2].encoded.num_units
    torch.testing.assert_close(scores[-1][0], whole[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores[-1][1, :real], whole[1, :real], atol=1e-5, rtol=1e-4)
    assert (scores[-1][1, real:] == OUT).all()
    # heads behind fewer blocks say something else
    assert (scores[0][0] - whole[0]).abs().max() > 0.01


def test_focus_lets_the_best_units_of_a_long_document_go_on(model: DocumentModel, rows: list[Row]) -> None:
    encoded = rows[1].encoded
    assert encoded.num_tokens > 2 * LEAST_TOKENS
    seen = list(in_segments(model).walk(graph_inputs([encoded])))
    kept = seen[1].arrays["kept_units"][0]
    kept = kept[kept >= 0]
    assert seen[1].hidden.shape[1] == LEAST_TOKENS
    # half of the tokens, and short units fit best
    assert 0.3 < len(kept) / encoded.num_units < 0.8
    # the best unit goes on, the worst does not
    first = seen[0].scores[0]
    assert first.argmax() in kept
    assert first.argmin() not in kept
    # deeper segments see these units as a document of their own would be
    scores = in_segments(model)(tensors([encoded]))
    assert ((scores[2][0].numpy() > OUT) == np.isin(np.arange(encoded.num_units), kept)).all()


@pytest.mark.parametrize("number", [0, 1, 2])
def test_padding_changes_nothing(model: DocumentModel, rows: list[Row], number: int) -> None:
    row = rows[number]
    paths = in_segments(model)
    alone = paths(tensors([row.encoded]))
    length = length_of(row)
    assert length % 256 == 0
    assert length >= max(row.encoded.num_tokens, 8 * row.encoded.num_units)
    arrays = collate([row, row], length)
    assert arrays["input_ids"].shape == (2, length)
    assert arrays["unit_features"].shape == (2, length // 8, 11)
    padded = paths({name: torch.from_numpy(array) for name, array in arrays.items()})
    # a longer row may let more tokens go on; the first head sees all of them in any case
    for one, other in zip(alone[:1], padded[:1], strict=True):
        torch.testing.assert_close(other[0, : row.encoded.num_units], one[0], atol=1e-5, rtol=1e-4)
        assert (other[0, row.encoded.num_units :] == OUT).all()
    for one in padded:
        torch.testing.assert_close(one[0], one[1])


def test_summaries_are_graded(rows: list[Row]) -> None:
    units = rows[1].encoded.num_units
    scores = np.linspace(1, 0, units)
    chosen, grades = judged(rows[1], np.stack([scores, scores[::-1], scores * 2]))
    assert chosen[0] == chosen[2] != chosen[1]
    texts = [rows[1].units[place].text for place in chosen[1]]
    assert grades[1] == pytest.approx(rouge(rows[1].document.abstract, texts)[0] / 100)
    assert grades[0] == grades[2]
    bare = replace(rows[0], document=replace(rows[0].document, abstract=""))
    assert judged(bare, np.stack([scores]))[1] == []


def test_documents_of_the_training_are_known(tmp_path: Path, document: Document) -> None:
    file = tmp_path / "own.jsonl"
    other = replace(document, text="Another text, with another sentence.", split="test")
    lines = [
        {"id": "a", "title": one.title, "text": one.text, "abstract": one.abstract, "split": one.split}
        for one in (document, other)
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert known_digests(file) == {digest_of(document)}
    assert digest_of(document) != digest_of(other)


# error messages


def options(work: Path) -> dict[str, object]:
    return {"work": work, "seed": 0, "limit": None, "progress": lambda _what, _done: None, "show_progress": False}


def test_runs_and_plans_that_have_no_paths(tmp_path: Path) -> None:
    from trilevel.applications.documents.checkpoint import PRETRAINED

    with pytest.raises(ConfigError, match=r"has an encoder of its own, of 128 numbers a token: too small for paths"):
        make_document_family(PRETRAINED, tmp_path / "data.jsonl", None, **options(tmp_path))  # type: ignore[arg-type]


def test_the_default_plan_fits_every_depth() -> None:
    for layers, places in ((6, (1, 3)), (12, (2, 6)), (3, (1, 2)), (24, (4, 12))):
        exits = default_plan(layers).stages[0].config
        assert exits.places(layers) == places  # type: ignore[union-attr]


def test_a_run_does_not_know_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: DocumentModel) -> None:
    from trilevel.applications.documents import route_family

    monkeypatch.setattr(route_family, "load_run", lambda _source: (model, None))
    with pytest.raises(InputError, match="does not say where its documents lie"):
        make_document_family("run", None, None, **options(tmp_path))  # type: ignore[arg-type]
