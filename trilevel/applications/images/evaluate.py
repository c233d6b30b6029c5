"""Evaluation: which images were held out, and what a model says of them; the numbers are those of texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trilevel.applications.classification.evaluate import Outcome, compare, report
from trilevel.applications.images.checkpoint import Run
from trilevel.applications.images.score import classify
from trilevel.compression.measure import count_parameters
from trilevel.data.image_folder import check_labels, load_images
from trilevel.data.image_sources import SPLITS, Progress
from trilevel.data.places import data_path
from trilevel.errors import ConfigError, InputError

__all__ = ["HeldOut", "Outcome", "check_comparable", "compare", "evaluate", "facts", "held_out", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Images to evaluate on.

    Attributes:
        path: of the data.
        split: `test`, `valid`, `train`, or `all` of other data.
        labels: of the data.
        pixels: uint8 (images, channels, height, width).
        classes: (images,), places in `labels`.
        num_shared: images held out that are in `train` too.
    """

    path: Path
    split: str
    labels: tuple[str, ...]
    pixels: np.ndarray
    classes: np.ndarray
    num_shared: int


def held_out(
    run: Run,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> HeldOut:
    """Images that the model was not trained on.

    Without `path`, or with the data of the training: its test split if there is one, else the validation split. All
    images of any other data, resized to what the model reads. `split` names the split instead. `limit` as in
    `load_images`.

    Raises:
        InputError: the data cannot be read, has a class that the model does not know, or no such image.
        ConfigError: `split` is none.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split={split!r} is none of {', '.join(SPLITS)}.")
    given = data_path(run.origin.path if path is None else path)
    if path is None and not given.exists():
        raise InputError(f"{given}, which the model was trained on, is no longer there. Name the data to evaluate on.")
    is_own = path is None or str(given.resolve()) == run.origin.path
    size = run.origin.size if is_own else run.model.config.patches.image_size
    images = load_images(
        given, valid_fraction=run.origin.valid_fraction, size=size, cache=cache, on_progress=on_progress
    )
    if images.image_size != run.model.config.patches.image_size:
        raise InputError(
            f"{given} now holds images of {images.image_size} pixels and the model reads "
            f"{run.model.config.patches.image_size}. Restore the data, or name other data."
        )
    is_own = is_own or images.sha256 == run.origin.sha256
    if is_own or split is not None:
        name = split or ("test" if len(images.rows["test"]) else "valid")
        rows = images.rows[name]
    else:
        name, rows = "all", np.concatenate([images.rows[part] for part in ("test", "valid", "train")])
    rows = rows[:limit]
    if not len(rows):
        raise InputError(f"{given}: no image in the split {name!r} to evaluate on.")
    check_labels(images, run.labels)
    return HeldOut(
        path=given,
        split=name,
        labels=images.labels,
        pixels=images.pixels[rows],
        classes=images.classes[rows],
        num_shared=images.num_shared if name in ("valid", "test") else 0,
    )


def check_comparable(ours: Run, theirs: Run, images: HeldOut) -> None:
    """Raise `ConfigError` if the other model has other classes or sizes, or knows images that ours held out."""
    if set(ours.labels) != set(theirs.labels):
        raise ConfigError(f"{theirs.folder} has the classes {theirs.labels} and {ours.folder} {ours.labels}.")
    sizes = [run.model.config.patches.image_size for run in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{theirs.folder} reads images of {sizes[1]} pixels and {ours.folder} of {sizes[0]}.")
    same_data = theirs.origin.sha256 == ours.origin.sha256 and images.split != "all"
    if same_data and theirs.origin.valid_fraction != ours.origin.valid_fraction:
        raise ConfigError(
            f"{theirs.folder} was split with valid_fraction={theirs.origin.valid_fraction} and {ours.folder} with "
            f"{ours.origin.valid_fraction}, so it may know the images that are compared. Train both alike."
        )


def evaluate(run: Run, images: HeldOut, *, on_progress: Callable[[int], None] = lambda _done: None) -> Outcome:
    """Classify the images."""
    places = np.array([run.labels.index(label) for label in images.labels])
    truth = places[images.classes]
    chances = classify(run, images.pixels, on_progress=on_progress).numpy()
    likely = np.maximum(chances[np.arange(len(truth)), truth], np.finfo(np.float64).tiny)
    return Outcome(labels=run.labels, truth=truth, predicted=chances.argmax(-1), log_loss=float(-np.log(likely).mean()))


def facts(run: Run) -> dict[str, Any]:
    """What a report says of a model: whether it is dense, its parameters and tokens, the teacher it had."""
    encoder = run.model.config.encoder
    return {
        "dense": encoder.levels is None,
        "parameters": count_parameters(run.model),
        "tokens": run.model.config.patches.num_tokens,
        "teacher": run.origin.teacher,
    }
