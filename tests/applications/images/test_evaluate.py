"""Which images are evaluated, what is said of them, and files to predict for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.applications.images.tiny import LABELS, RECIPE, SIZE, train_tiny, write_images
from trilevel.applications.images.checkpoint import Run
from trilevel.applications.images.evaluate import check_comparable, evaluate, facts, held_out
from trilevel.applications.images.predict import predict
from trilevel.applications.images.predictions import files
from trilevel.applications.images.recipe import DataConfig, Schedule
from trilevel.applications.images.score import classify
from trilevel.data.images import load_image
from trilevel.errors import ConfigError, InputError

FEW = dataclasses.replace(RECIPE, schedule=Schedule(steps=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_tiny(tmp_path_factory.mktemp("images"), recipe=FEW).run


def cache_of(run: Run) -> Path:
    return run.folder.parent / "cache"


def test_own_and_other_images(run: Run, tmp_path: Path) -> None:
    cache = cache_of(run)
    own = held_out(run, cache=cache)
    assert (own.split, len(own.classes)) == ("valid", len(own.pixels))
    trained = held_out(run, split="train", cache=cache)
    assert len(own.classes) + len(trained.classes) == 120
    # a copy elsewhere is the same data
    copy = write_images(tmp_path / "copy")
    assert np.array_equal(held_out(run, copy, cache=cache).pixels, own.pixels)
    other = held_out(run, write_images(tmp_path / "other", 5, seed=9), limit=7, cache=cache)
    assert (other.split, len(other.classes)) == ("all", 7)


def test_other_sizes_are_resized_and_classes_found_by_name(run: Run, tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra 'images'")
    data = write_images(tmp_path / "other", 4, seed=9, labels=(*LABELS, "third"))
    with pytest.raises(InputError, match="unknown classes 'third'; the model knows 'lying', 'standing'"):
        held_out(run, data, cache=cache_of(run))
    for label in ("third", "lying"):
        for file in (data / label).iterdir():
            file.unlink()
        (data / label).rmdir()
    for file in (data / "standing").iterdir():
        pil.open(file).resize((31, 23)).save(file)
    found = held_out(run, data, cache=cache_of(run))
    assert found.pixels.shape == (4, 1, SIZE, SIZE)
    # the only class of the data is the second of the model
    assert set(evaluate(run, found).truth.tolist()) == {1}


def test_what_cannot_be_evaluated(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split='dev' is none of train, valid, test"):
        held_out(run, split="dev")
    with pytest.raises(InputError, match="no image in the split 'test'"):
        held_out(run, split="test", cache=cache_of(run))
    gone = dataclasses.replace(run, origin=dataclasses.replace(run.origin, path=str(tmp_path / "gone")))
    with pytest.raises(InputError, match="is no longer there"):
        held_out(gone)


def test_data_of_a_run_is_looked_up_below_trilevel_data(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(run.origin.path)
    moved = dataclasses.replace(run, origin=dataclasses.replace(run.origin, path=whole.name))
    monkeypatch.setenv("TRILEVEL_DATA", str(whole.parent))
    assert (held_out(moved, cache=cache_of(run)).pixels == held_out(run, cache=cache_of(run)).pixels).all()


def test_only_like_runs_are_compared(run: Run, tmp_path: Path) -> None:
    images = held_out(run, cache=cache_of(run))
    check_comparable(run, run, images)
    split = dataclasses.replace(FEW, data=dataclasses.replace(DataConfig(), valid_fraction=0.3))
    other = train_tiny(tmp_path, "split", recipe=split).run
    with pytest.raises(ConfigError, match=r"was split with valid_fraction=0\.3 .* Train both alike"):
        check_comparable(run, other, images)
    check_comparable(run, other, dataclasses.replace(images, split="all"))
    small = train_tiny(tmp_path, "small", recipe=FEW, size=(8, 8)).run
    with pytest.raises(ConfigError, match=r"reads images of \(8, 8\) pixels"):
        check_comparable(run, small, images)
    config = dataclasses.replace(run.model.config, labels=("x", "y"))
    run_of_others = dataclasses.replace(run, model=type(run.model)(config))
    with pytest.raises(ConfigError, match="has the classes"):
        check_comparable(run, run_of_others, images)
    assert facts(other)["dense"] is False


def test_predictions_are_those_of_the_data_set(run: Run, tmp_path: Path) -> None:
    data = Path(run.origin.path)
    paths = files([str(data / "lying" / "3.png"), str(data / "standing")])
    assert len(paths) == 61
    found = list(predict(run, paths))
    pixels = torch.stack([load_image(path)[:1] for path in paths]).numpy()
    wanted = classify(run, pixels)
    for row, given in zip(wanted, found, strict=True):
        assert list(given.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert given.label == LABELS[int(row.argmax())]
    with pytest.raises(InputError, match="holds no image to classify"):
        files([str(tmp_path)])
    with pytest.raises(InputError, match=r"none\.png: not a readable image"):
        list(predict(run, files([str(tmp_path / "none.png")])))
