"""Training: it learns, alone and from a teacher, resumes bit for bit, and its folder is all that is needed."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.applications.images.tiny import LABELS, LEVELS, RECIPE, SIZE, STEPS, train_tiny, write_images
from trilevel.applications.images import recipe as recipes
from trilevel.applications.images.batches import ImageBatches
from trilevel.applications.images.checkpoint import Run, is_image_run, load_run
from trilevel.applications.images.evaluate import evaluate, held_out, report
from trilevel.applications.images.objective import LossConfig
from trilevel.applications.images.recipe import (
    ModelConfig,
    Recipe,
    Schedule,
    load_recipe,
    parse_size,
    pixel_statistics,
)
from trilevel.applications.images.score import classify
from trilevel.data.image_folder import load_images
from trilevel.data.places import data_path
from trilevel.errors import CheckpointError, ConfigError, InputError
from trilevel.model.checkpoint import save_checkpoint
from trilevel.training.interrupt import TrainingInterrupted

REPOSITORY = Path(__file__).parents[3]


def weights(run: Run) -> dict[str, Tensor]:
    return run.model.state_dict()


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open() as log:
        return list(csv.DictReader(log))


def test_it_learns_and_loads(tmp_path: Path) -> None:
    told: list[Any] = []
    made = train_tiny(tmp_path, on_start=lambda images, model: told.append((images, model)))
    assert told[0][0].labels == LABELS
    images = held_out(made.run, cache=tmp_path / "cache")
    assert (images.split, images.num_shared) == ("valid", 0)
    assert report(evaluate(made.run, images))["accuracy"] > 0.9
    assert float(log_of(tmp_path / "run")[-1]["evaluation_accuracy"]) > 0.9
    run = load_run(tmp_path / "run")
    assert (run.labels, run.step, run.steps, run.model.training) == (LABELS, STEPS, STEPS, False)
    assert run.model.config.encoder.levels == LEVELS
    assert run.model.config.patches.order == "hilbert"
    torch.testing.assert_close(classify(run, images.pixels), classify(made.run, images.pixels), rtol=0, atol=0)


def test_a_dense_teacher_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = train_tiny(tmp_path, "teacher", is_dense=True).run
    assert teacher.model.config.encoder.levels is None
    few = dataclasses.replace(RECIPE, schedule=Schedule(steps=20))
    monkeypatch.setattr(recipes, "NUM_VALIDATION_IMAGES", 7)
    # tiles divide the grid of 6 x 6; the teacher's order is another
    tiles = dataclasses.replace(few, model=dataclasses.replace(few.model, order="tiles", tile=2))
    first: list[Any] = []

    def look(_images: Any, model: Any) -> None:
        first.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    student = train_tiny(tmp_path, "student", recipe=tiles, teacher=tmp_path / "teacher", on_start=look).run
    shared = set(weights(teacher)) & set(first[0])
    assert len(shared) > 10
    assert all(torch.equal(weights(teacher)[name], first[0][name]) for name in shared)
    rows = log_of(tmp_path / "student")
    assert float(rows[-1]["hidden"]) < float(rows[0]["hidden"]) < 1
    # it comes closer
    assert float(rows[-1]["divergence"]) < float(rows[0]["divergence"])
    assert report(evaluate(student, held_out(student, cache=tmp_path / "cache")))["accuracy"] > 0.9
    assert student.origin.teacher == str(tmp_path / "teacher")
    # another teacher is another run
    train_tiny(tmp_path, "other", is_dense=True, recipe=few)
    with pytest.raises(ConfigError, match="different are: teacher weights"):
        train_tiny(tmp_path, "student", recipe=tiles, teacher=tmp_path / "other")


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(RECIPE, schedule=Schedule(steps=14))
    whole = train_tiny(tmp_path, "whole", recipe=few).run
    batch = ImageBatches.batch

    def stopping(self: ImageBatches, step: int) -> dict[str, Tensor]:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return batch(self, step)

    monkeypatch.setattr(ImageBatches, "batch", stopping)
    with pytest.raises(TrainingInterrupted, match="stopped after step 7 of 14"):
        train_tiny(tmp_path, "part", recipe=few)
    stopped = load_run(tmp_path / "part")
    assert (stopped.step, stopped.steps) == (7, 14)
    monkeypatch.setattr(ImageBatches, "batch", batch)
    rest = train_tiny(tmp_path, "part", recipe=few).run
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(rest)[name], tensor, rtol=0, atol=0, msg=name)


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    few = dataclasses.replace(RECIPE, schedule=Schedule(steps=1))
    train_tiny(tmp_path, recipe=few)
    (tmp_path / "images").rename(tmp_path / "moved")
    # where the data lies does not matter
    recipes.train(
        tmp_path / "moved", out_dir=tmp_path / "run", recipe=few, cache=tmp_path / "cache", show_progress=False
    )
    (tmp_path / "moved").rename(tmp_path / "images")
    with pytest.raises(ConfigError, match="different are: levels"):
        train_tiny(tmp_path, recipe=few, is_dense=True)
    with pytest.raises(ConfigError, match=r"different are: .*limit"):
        train_tiny(tmp_path, recipe=few, limit=40)
    write_images(tmp_path / "images", 1, seed=5)
    with pytest.raises(ConfigError, match=r"different are: .*data"):
        train_tiny(tmp_path, recipe=few)


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    few = dataclasses.replace(RECIPE, schedule=Schedule(steps=1))
    train_tiny(tmp_path, "teacher", recipe=few)
    wide = dataclasses.replace(few, model=dataclasses.replace(few.model, dim=48))
    with pytest.raises(ConfigError, match=r"vectors cannot be compared; set hidden_weight = 0\.0"):
        train_tiny(tmp_path, recipe=wide, teacher=tmp_path / "teacher")
    wide = dataclasses.replace(wide, loss=LossConfig(hidden_weight=0.0))
    train_tiny(tmp_path, recipe=wide, teacher=tmp_path / "teacher")
    with pytest.raises(ConfigError, match=r"the teacher reads images of .* train both on the same images"):
        train_tiny(tmp_path, "new", recipe=few, teacher=tmp_path / "teacher", size=(8, 8))
    write_images(tmp_path / "three", labels=(*LABELS, "third"))
    with pytest.raises(ConfigError, match="the teacher has the classes"):
        recipes.train(
            tmp_path / "three",
            out_dir=tmp_path / "new",
            recipe=few,
            teacher=tmp_path / "teacher",
            cache=tmp_path / "cache",
        )
    with pytest.raises(CheckpointError, match="no trained image classifier"):
        train_tiny(tmp_path, "new", teacher=tmp_path)
    assert not (tmp_path / "new").exists()


def test_pixels_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    images = load_images(write_images(tmp_path / "images"), valid_fraction=0.2, cache=tmp_path / "cache")
    pixels = images.pixels[images.rows["train"]].astype(np.float64)
    mean, deviation = pixel_statistics(images)
    assert mean == pytest.approx([pixels.mean()], abs=1e-4)
    assert deviation == pytest.approx([pixels.std()], abs=1e-4)


# recipes


@pytest.mark.parametrize(("name", "grid"), [("fashion", 14), ("cifar", 16)])
def test_the_shipped_recipes(name: str, grid: int) -> None:
    recipe = load_recipe(REPOSITORY / "recipes" / f"images-{name}.toml")
    assert recipe.model.tile is not None
    assert grid % recipe.model.tile == 0
    assert recipe.levels.region_size == recipe.model.tile**2
    assert recipe.levels.ratio == LEVELS.ratio
    assert recipe.levels.ratio.split(recipe.model.num_heads) == (2, 2, 1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[modle]", "unknown table modle; known are data, model, loss, schedule, levels and train"),
        ("[model]\nwidth = 3", "unknown key 'width'"),
        ("[levels]\nwindow = 4", "window=4 must be odd"),
        ("levels = 3", "levels=3 is no table"),
        ("[train]\nsteps = 4", "train.steps follows from the table schedule"),
        ("[train]\nbetas = 4", "train.betas=4 must be two numbers"),
        ("[loss]\nteacher_weight = 2", r"teacher_weight=2 must lie in \[0, 1\]"),
        ("[loss]\ntemperature = 0", "temperature=0 must be > 0"),
        ("[schedule]\nepochs = 0", "epochs=0 must be a whole number >= 1"),
        ("[schedule]\nwarmup_fraction = 1", "warmup_fraction=1 must lie"),
        ("a = ", "not TOML"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_recipe(tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match="no recipe there"):
        load_recipe(tmp_path / "none.toml")


def test_levels_of_a_recipe_keep_what_is_not_given(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[levels]\nnum_regions = 7\n")
    levels = load_recipe(tmp_path / "recipe.toml").levels
    assert (levels.num_regions, levels.region_size) == (7, None)
    assert levels.ratio == Recipe().levels.ratio


def test_sizes_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_size("28X32") == (28, 32)
    for bad in ("", "0", "1x2x3", "-3", "a"):
        with pytest.raises(ConfigError, match="must be a number of pixels"):
            parse_size(bad)
    (tmp_path / "sets" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRILEVEL_DATA", str(tmp_path / "sets"))
    assert data_path("images") == tmp_path / "sets" / "images"
    assert data_path("none") == Path("none")
    (tmp_path / "images").mkdir()
    assert data_path("images") == Path("images")


# damaged runs


def test_bad_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no trained image classifier at .* `trilevel train images`"):
        load_run(tmp_path)
    assert not is_image_run(tmp_path)
    save_checkpoint(tmp_path / "other" / "checkpoint", model=torch.nn.Linear(2, 3), config={})
    assert not is_image_run(tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds no image classifier"):
        load_run(tmp_path / "other")
    train_tiny(tmp_path, recipe=dataclasses.replace(RECIPE, schedule=Schedule(steps=1)))
    assert is_image_run(tmp_path / "run")
    file = tmp_path / "run" / "checkpoint" / "config.json"
    config = json.loads(file.read_text())
    config["config"]["image_classifier"]["mean"] = []
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its configuration is not understood"):
        load_run(tmp_path / "run")


def test_bad_data(tmp_path: Path) -> None:
    write_images(tmp_path / "images", labels=("one",))
    with pytest.raises(InputError, match="at least two classes"):
        train_tiny(tmp_path)
    write_images(tmp_path / "images")
    with pytest.raises(ConfigError, match=rf"patch_size=\(5, 5\) does not divide image_size=\({SIZE}, {SIZE}\)"):
        train_tiny(tmp_path, recipe=dataclasses.replace(RECIPE, model=ModelConfig(patch_size=5)))
    with pytest.raises(ConfigError, match="needs a tile"):
        train_tiny(tmp_path, recipe=dataclasses.replace(RECIPE, model=ModelConfig(order="tiles")))
    assert not (tmp_path / "run").exists()
