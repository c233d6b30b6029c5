"""The documents model as an artifact: the graph's answers, the shipped INT8 one, summaries without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from trilevel.applications.documents import export as exporting
from trilevel.applications.documents.artifact import INT8, DocumentPredictor, export_documents, graph_inputs
from trilevel.applications.documents.builtin import builtin_document, builtin_pieces
from trilevel.applications.documents.checkpoint import CHECKPOINT_FOLDER, MINILM, PRETRAINED, load_run
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.graph import ScoringGraph, mean_between
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.summarize import score_units, summarize
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.artifact.check import installed
from trilevel.artifact.export.onnx import exportable
from trilevel.artifact.manifest import Artifact, read_artifact
from trilevel.artifact.runtime.predictor import Runtime, load_predictor
from trilevel.artifact.verify import check_probes, integer_kernels
from trilevel.cli.main import app
from trilevel.data.documents import Document, read_file
from trilevel.errors import ConfigError, InputError
from trilevel.model.checkpoint import MODEL_FILE
from trilevel.model.folder import sha256_of

RUNTIMES = [name for name in installed() if name != "torch"]


@pytest.fixture(scope="module")
def shipped() -> tuple[DocumentModel, DocumentTokenizer]:
    return load_run()


@pytest.fixture(scope="module")
def long(shipped: tuple[DocumentModel, DocumentTokenizer]) -> Encoded:
    return encode(split_units(builtin_document()), shipped[1])


class InTorch:
    """A predictor that runs the graph as torch traces it."""

    runtime, version, precision = "torch", "", "float32"

    def __init__(self, model: DocumentModel) -> None:
        self._graph = exportable(ScoringGraph(model))

    def run(self, inputs: Any) -> dict[str, Any]:
        with torch.inference_mode():
            return {"scores": self._graph(**{name: torch.from_numpy(x) for name, x in inputs.items()}).numpy()}


def test_means_of_units_that_cross_blocks_and_of_none() -> None:
    lengths = [[1, 128, 127, 3, 128, 128, 5], [61, 2, 0, 0, 0, 0, 0]]
    ends = torch.tensor(lengths).cumsum(1)
    starts = ends - torch.tensor(lengths)
    x = torch.randn(2, 523, 3, dtype=torch.float64)
    found = mean_between(x, starts, ends)
    for row, counts in enumerate(lengths):
        for unit, count in enumerate(counts):
            begin = int(starts[row, unit])
            wanted = x[row, begin : begin + count].mean(0) if count else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(found[row, unit], wanted)


@pytest.mark.parametrize("lengths", [(200,), (1,), (229, 131), (2_000, 701)])
def test_the_graph_gives_the_scores_of_the_model(
    shipped: tuple[DocumentModel, DocumentTokenizer], long: Encoded, lengths: tuple[int, ...]
) -> None:
    documents = [long.cut(tokens) for tokens in lengths]
    found = InTorch(shipped[0]).run(graph_inputs(documents))["scores"]
    for row, document in enumerate(documents):
        units = document.num_units
        np.testing.assert_allclose(found[row, :units], score_units(shipped[0], document), atol=1e-5)
        assert (found[row, units:] == 0).all()


def test_a_predictor_gives_the_summaries_of_torch(
    shipped: tuple[DocumentModel, DocumentTokenizer], document: Document, tmp_path: Path
) -> None:
    predictor = DocumentPredictor(read_artifact(INT8), InTorch(shipped[0]))  # type: ignore[arg-type]
    path = tmp_path / "given.md"
    path.write_text(document.text, encoding="utf-8")
    given: list[str | Path | Document] = [document, document.text, path]
    read = [document, Document(id="", title="", text=document.text), read_file(path)]
    for found, one in zip(predictor.predict(given, budget_words=23), read, strict=True):
        wanted = summarize(*shipped, one, budget_words=23)
        assert (found.sentences, found.indices, found.units) == (wanted.sentences, wanted.indices, wanted.units)
        assert (found.num_tokens, found.units_left_out) == (wanted.num_tokens, wanted.units_left_out)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    assert len(predictor.predict([document], num_sentences=2)[0].sentences) == 2


def test_inputs_that_are_none(shipped: tuple[DocumentModel, DocumentTokenizer]) -> None:
    predictor = DocumentPredictor(read_artifact(INT8), InTorch(shipped[0]))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one document was given; a list"):
        predictor.predict("a text")
    with pytest.raises(InputError, match="a int was given"):
        predictor.predict([3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="no title, heading or sentence"):
        predictor.predict([""])
    with pytest.raises(ConfigError, match="words"):
        predictor.predict(["a text"], budget_words=0)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_shipped_artifact_answers_as_it_was_made_to(runtime: Runtime) -> None:
    artifact = read_artifact(INT8)
    predictor = load_predictor(artifact, runtime, threads=1)
    assert check_probes(artifact, predictor).holds
    assert len(integer_kernels(predictor)) == 16


def test_the_shipped_artifact_is_the_shipped_model() -> None:
    artifact = read_artifact(INT8)
    assert artifact.manifest.settings["weights_sha256"] == sha256_of(PRETRAINED / CHECKPOINT_FOLDER / MODEL_FILE)
    assert (artifact.manifest.task, artifact.manifest.precision, artifact.manifest.target) == (
        "documents",
        "int8",
        "portable",
    )


@pytest.mark.skipif("onnxruntime" not in RUNTIMES, reason="needs ONNX Runtime")
def test_int8_without_torch_chooses_what_float32_chooses(
    shipped: tuple[DocumentModel, DocumentTokenizer],
) -> None:
    code = f"""
import json, sys
from trilevel.applications.documents.artifact import INT8, DocumentPredictor
from trilevel.applications.documents.builtin import builtin_pieces
from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.runtime.predictor import load_predictor
artifact = read_artifact(INT8)
predictor = DocumentPredictor(artifact, load_predictor(artifact, "onnxruntime", threads=1))
print(json.dumps([found.indices for found in predictor.predict(builtin_pieces()[:{len(PIECES)}])]))
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shares = []
    for ours, piece in zip(json.loads(done.stdout), PIECES, strict=True):
        theirs = summarize(*shipped, piece).indices
        shares.append(len(set(ours) & set(theirs)) / len(set(ours) | set(theirs)))
    assert np.mean(shares) > 0.9


PIECES = builtin_pieces()[:7]


def test_the_one_on_minilm_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "cache"))
    made: list[Any] = []

    def export(source: Any, out: Path, **_: Any) -> Artifact:
        made.append(source)
        return read_artifact(shutil.copytree(INT8, out))

    monkeypatch.setattr(exporting, "export", export)
    options = ["export", "documents", str(tmp_path / "out"), "--backbone", "minilm"]
    for _ in range(2):
        done = CliRunner().invoke(app, options)
        assert done.exit_code == 0, done.output
    assert made == [MINILM]
    assert read_artifact(tmp_path / "out").hashes == read_artifact(INT8).hashes
    # one that is damaged is made again
    (kept,) = (tmp_path / "cache" / "artifacts").iterdir()
    (kept / "model.onnx").write_bytes(b"")
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "is damaged and made again" in done.stderr
    assert made == [MINILM, MINILM]


def test_the_shipped_artifact_is_exported_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", "documents", "out", "--runtime-check", RUNTIMES[0], "--json"])
    assert done.exit_code == 0, done.output
    assert read_artifact("out").hashes == read_artifact(INT8).hashes
    for wrong in (["export", "run", "out", "--backbone", "minilm"], ["export", "documents", "out", "--target", "cpu"]):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2
        assert "the summariser that ships, which is portable or native" in " ".join(done.stderr.split())


def test_no_documents_to_calibrate_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no documents to measure ranges on"):
        export_documents(None, tmp_path / "out", calibration=[], tell=lambda _what: None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_exported_model_equals_torch_at_every_length(
    shipped: tuple[DocumentModel, DocumentTokenizer], long: Encoded, tmp_path: Path
) -> None:
    artifact: Artifact = export_documents(None, tmp_path / "out", tell=lambda _what: None)
    assert artifact.manifest.precision == "float32"
    for runtime in RUNTIMES:
        predictor = load_predictor(artifact, runtime, threads=1)
        for lengths in ((200,), (2_000,), (8_192,), (200, 131), (2_000, 701), (8_192, 2_000)):
            documents = [long.cut(tokens) for tokens in lengths]
            found = predictor.run(graph_inputs(documents))["scores"]
            for row, document in enumerate(documents):
                wanted = score_units(shipped[0], document)
                np.testing.assert_allclose(found[row, : document.num_units], wanted, atol=1e-4)
