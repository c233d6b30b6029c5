"""Image classifiers as something to compress: where the images come from, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.applications.images.tiny import RECIPE, train_tiny, write_images
from trilevel.applications.images.checkpoint import load_run
from trilevel.applications.images.compress import load_task
from trilevel.applications.images.evaluate import evaluate, held_out, report
from trilevel.applications.images.recipe import Schedule
from trilevel.errors import ConfigError, InputError

FEW = replace(RECIPE, schedule=Schedule(steps=20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a run, and a dense one on them."""
    made = tmp_path_factory.mktemp("compress")
    train_tiny(made, recipe=FEW)
    train_tiny(made, "dense", recipe=FEW, is_dense=True)
    return made


def test_data_are_those_of_the_run(folder: Path) -> None:
    task = load_task(folder / "run", cache=folder / "cache")
    run = load_run(folder / "run")
    images = held_out(run, split="valid", cache=folder / "cache")
    found = task.evaluate(run.model)
    assert found["accuracy"] == report(evaluate(run, images))["accuracy"]
    assert found["examples"] == len(images.classes)
    assert task.evaluate(run.model, limit=5)["examples"] == 5
    rows = sum(len(batch["labels"]) for batch in task.calibration)
    assert 64 <= rows <= 256
    assert {len(batch["labels"]) for batch in task.calibration} == {32}
    assert task.single()["pixels"].shape[0] == 1
    assert task.importance(run.model, task.calibration[0]).requires_grad
    outputs = task.forward(run.model, task.calibration[0])
    correct = task.supervised(outputs, task.calibration[0])["accuracy"]
    assert 0 <= float(correct) <= 1


def test_other_data_of_the_same_classes(folder: Path, tmp_path: Path) -> None:
    own = load_task(folder / "run", cache=folder / "cache")
    write_images(tmp_path / "others", 40, seed=3)
    other = load_task(folder / "run", data=tmp_path / "others", cache=folder / "cache")
    assert other.data_sha256 != own.data_sha256
    assert other.source_sha256 == own.source_sha256
    few = load_task(folder / "run", limit=29, cache=folder / "cache", options={"batch_size": 5})
    assert few.data_sha256 != own.data_sha256
    assert few.batches.batch(0)["labels"].shape == (5,)
    assert few.steps_of(2) == 2 * (29 // 5)
    assert len(few.calibration) == 1


def test_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'flips'"):
        load_task(folder / "run", options={"flips": True}, cache=folder / "cache")
    write_images(tmp_path / "others", 40, labels=("lying", "hanging"))
    with pytest.raises(InputError, match="hanging"):
        load_task(folder / "run", data=tmp_path / "others", cache=folder / "cache")
    moved = tmp_path / "moved"
    shutil.copytree(folder / "run", moved)
    config = moved / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace(str(folder / "images"), str(folder / "gone")))
    with pytest.raises(InputError, match="Name the images with --data"):
        load_task(moved, cache=folder / "cache")
    assert load_task(moved, data=folder / "images", cache=folder / "cache").metric == "accuracy"


def test_teachers(folder: Path) -> None:
    task = load_task(folder / "run", cache=folder / "cache")
    teacher, sha256 = task.load_teacher(folder / "dense")
    task.check_teacher(teacher)
    assert sha256 != task.source_sha256
    tiles = replace(FEW, model=replace(FEW.model, order="tiles", tile=2))
    train_tiny(folder, "tiles", recipe=tiles)
    with pytest.raises(ConfigError, match="patches in another order"):
        task.check_teacher(task.load_teacher(folder / "tiles")[0])


def test_labels_follow_the_order_of_the_model(folder: Path, tmp_path: Path) -> None:
    task = load_task(folder / "run", cache=folder / "cache")
    logits = torch.zeros(len(task.labels), 2)
    logits[np.arange(len(task.labels)), task.labels] = 1.0
    images = held_out(load_run(folder / "run"), split="valid", cache=folder / "cache")
    rows = task.images.rows["valid"]
    assert np.array_equal(np.array(images.labels)[images.classes], np.array(task.run.labels)[task.labels[rows]])
