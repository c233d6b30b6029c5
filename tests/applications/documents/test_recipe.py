"""The recipe, a run of a few steps, its resume, and what a damaged run says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from trilevel.applications.documents.checkpoint import PRETRAINED, load_model, load_run, save_run
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.recipe import DEFAULT_RECIPE, Recipe, data_path, load_recipe, train
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.data.documents import Document
from trilevel.errors import CheckpointError, ConfigError, InputError


@pytest.fixture
def data_root(tmp_path: Path, document: Document) -> Path:
    folder = tmp_path / "data" / "docs"
    folder.mkdir(parents=True)
    rows = [
        {"title": f"Levels {i}", "text": document.text, "abstract": document.abstract, "split": split}
        for i, split in enumerate(["train", "train", "train", "valid"])
    ]
    (folder / "tech.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "data"


@pytest.fixture
def recipe() -> Recipe:
    full = load_recipe()
    return dataclasses.replace(
        full,
        data=dataclasses.replace(full.data, set="docs/tech.jsonl", max_tokens=67, max_batch_tokens=139),
        train=dataclasses.replace(full.train, steps=3, warmup_steps=1, checkpoint_every=1, log_every=1),
    )


def test_the_shipped_recipe_and_its_long_phase() -> None:
    first, long = load_recipe(), load_recipe(phase="long")
    assert first.data.max_tokens == 2_048
    assert long.data.max_tokens == 65_536
    assert long.train.steps != first.train.steps
    assert long.model == first.model


def test_a_run_and_its_dense_twin_start_alike(data_root: Path, tmp_path: Path, recipe: Recipe) -> None:
    ours = train(recipe, out_dir=tmp_path / "ours", data_root=data_root, show_progress=False)
    dense = train(recipe, out_dir=tmp_path / "dense", data_root=data_root, is_dense=True, show_progress=False)
    assert ours.step == dense.step == 3
    # levels and dense differ little in three steps from the same weights, dropout and data; other data differ by 80%
    assert ours.loss == pytest.approx(dense.loss, rel=0.05)
    model, tokenizer = load_run(tmp_path / "dense")
    assert model.config.is_dense
    assert tokenizer.vocab_size == model.config.tokens.vocab_size
    log = (tmp_path / "ours" / "log.csv").read_text().splitlines()
    assert "evaluation_oracle" in log[0]
    assert len(log) == 4


def test_a_stopped_run_goes_on_to_the_same_bits(data_root: Path, tmp_path: Path, recipe: Recipe) -> None:
    train(recipe, out_dir=tmp_path / "whole", data_root=data_root, show_progress=False)
    stopped = tmp_path / "stopped"

    class StopError(Exception):
        pass

    from trilevel.applications.documents import recipe as module

    calls = []

    def failing(held_out: object, max_tokens: int) -> object:
        def evaluate(model: torch.nn.Module) -> dict[str, float]:
            calls.append(1)
            if len(calls) == 3:
                raise StopError
            return {}

        return evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_validation", failing)
        with pytest.raises(StopError):
            train(recipe, out_dir=stopped, data_root=data_root, show_progress=False)
    result = train(recipe, out_dir=stopped, data_root=data_root, show_progress=False)
    assert result.step == 3
    one, two = load_model(tmp_path / "whole"), load_model(stopped)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_the_long_phase_goes_on_from_a_run(
    data_root: Path, tmp_path: Path, recipe: Recipe, model: DocumentModel, tokenizer: DocumentTokenizer
) -> None:
    save_run(tmp_path / "first", model, tokenizer)
    focused = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, focus_share=1.0))
    train(focused, out_dir=tmp_path / "long", data_root=data_root, start=tmp_path / "first", show_progress=False)
    moved = load_model(tmp_path / "long").score.weight - model.score.weight
    assert 0 < moved.abs().max() < 0.1
    with pytest.raises(ConfigError, match="has levels"):
        train(recipe, out_dir=tmp_path / "x", data_root=data_root, start=tmp_path / "first", is_dense=True)


def test_bad_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe there"):
        load_recipe(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[data")
    with pytest.raises(ConfigError, match="not TOML"):
        load_recipe(bad)
    text = DEFAULT_RECIPE.read_text()
    bad.write_text(text + "\n[colour]\nred = 1\n")
    with pytest.raises(ConfigError, match="unknown table colour"):
        load_recipe(bad)
    bad.write_text(text.replace("dropout = 0.2", "drop = 0.2", 1))
    with pytest.raises(ConfigError, match="unknown key 'drop'"):
        load_recipe(bad)


def test_where_the_data_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRILEVEL_DATA", str(tmp_path / "env"))
    assert data_path("a") == tmp_path / "env" / "a"
    assert data_path("a", tmp_path) == tmp_path / "a"
    monkeypatch.delenv("TRILEVEL_DATA")
    with pytest.raises(InputError, match="Set TRILEVEL_DATA"):
        data_path("a")


def test_damaged_runs(tmp_path: Path, model: DocumentModel, tokenizer: DocumentTokenizer) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_run(tmp_path / "none")
    save_run(tmp_path / "run", model, tokenizer)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_run(tmp_path / "run")
    weights = next((tmp_path / "run").rglob("model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"sha256|hash"):
        load_run(tmp_path / "run")


def test_a_tokenizer_of_another_model(tmp_path: Path, model: DocumentModel, tokenizer: DocumentTokenizer) -> None:
    from trilevel.applications.documents.tokenizer import train_tokenizer

    save_run(tmp_path / "run", model, tokenizer)
    train_tokenizer(["a few words here"] * 5, vocab_size=270).save(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokens in the tokenizer"):
        load_run(tmp_path / "run")


@pytest.mark.skipif(not (PRETRAINED / "checkpoint").exists(), reason="the model is not shipped yet")
def test_the_shipped_model_is_small_and_loads() -> None:
    model, _ = load_run()
    assert not model.config.is_dense
    size = sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file())
    assert size < 20e6
