"""Evaluation: accuracy with an interval, F1, each class, confusions; and two models on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trilevel.applications.classification.checkpoint import Run
from trilevel.applications.classification.data import SPLITS, Example, check_labels, load_data
from trilevel.applications.classification.score import classify
from trilevel.errors import ConfigError, InputError
from trilevel.model.folder import sha256_of

RESAMPLES = 10_000
_Z = 1.959964  # both tails of the normal distribution together hold 5% beyond it


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows to evaluate on; `split` says which: `test`, `valid`, `train`, or `all` of another file."""

    path: Path
    split: str
    examples: Sequence[Example]
    num_empty: int
    num_shared: int


def held_out(run: Run, path: Path | None = None, *, split: str | None = None, limit: int | None = None) -> HeldOut:
    """Rows that the model was not trained on.

    Without `path`, or with the file of the training: its test split if there is one, else the validation split. All
    rows of any other file. `split` names the split instead, found as in training. `limit` as in `load_data`.

    Raises:
        InputError: the file cannot be read, lacks a column, has a label that the model does not know, or no such row.
    """
    given = Path(run.origin.path) if path is None else path
    if path is None and not given.is_file():
        raise InputError(f"{given}, which the model was trained on, is no longer there. Name the file to evaluate on.")
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split={split!r} is none of {', '.join(SPLITS)}.")
    columns = run.origin.columns
    is_own = path is None or (given.is_file() and sha256_of(given) == run.origin.sha256)
    if not is_own and split is None:
        columns = type(columns)(text=columns.text, label=columns.label)
    data = load_data(given, columns, valid_fraction=run.origin.valid_fraction)
    if is_own or split is not None:
        name = split or ("test" if data.examples["test"] else "valid")
        examples = list(data.examples[name])
    else:
        name, examples = "all", [example for part in ("valid", "train") for example in data.examples[part]]
    examples = examples[:limit]
    if not examples:
        raise InputError(f"{given}: no row in the split {name!r} to evaluate on.")
    check_labels(examples, run.labels, given)
    shared = data.num_shared if name in ("valid", "test") else 0
    return HeldOut(path=given, split=name, examples=examples, num_empty=data.num_empty, num_shared=shared)


def check_comparable(ours: Run, theirs: Run, rows: HeldOut) -> None:
    """Raise `ConfigError` if the other model has other classes, or was trained on rows that ours held out.

    Rows are held out by the same rule when columns and share are equal, whatever the limit. Of a file that the other
    one was trained on, not all rows are taken.
    """
    if set(ours.labels) != set(theirs.labels):
        raise ConfigError(f"{theirs.folder} has the classes {theirs.labels} and {ours.folder} {ours.labels}.")
    if sha256_of(rows.path) != theirs.origin.sha256:
        return
    if rows.split == "all":
        raise ConfigError(f"{theirs.folder} was trained on {rows.path}, so it knows the rows. Name another file.")
    rules = [(run.origin.columns.text, run.origin.columns.split, run.origin.valid_fraction) for run in (ours, theirs)]
    if rules[0] != rules[1]:
        raise ConfigError(
            f"{theirs.folder} was split by another rule than {ours.folder} (text column, split column, "
            f"valid_fraction: {rules[1]} and {rules[0]}), so it may know the rows that are compared. Train both alike."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a model said: `truth` and `predicted` (rows,), places in `labels`; `log_loss` is the mean over the rows."""

    labels: tuple[str, ...]
    truth: np.ndarray
    predicted: np.ndarray
    log_loss: float

    @property
    def is_correct(self) -> np.ndarray:
        """(rows,) bool."""
        found: np.ndarray = self.truth == self.predicted
        return found


def evaluate(
    run: Run, examples: Sequence[Example], *, on_progress: Callable[[int], None] = lambda _done: None
) -> Outcome:
    """Classify the examples."""
    places = {label: place for place, label in enumerate(run.labels)}
    truth = np.array([places[example.label] for example in examples])
    chances = classify(run, [example.text for example in examples], on_progress=on_progress).numpy()
    likely = np.maximum(chances[np.arange(len(truth)), truth], np.finfo(np.float64).tiny)
    return Outcome(labels=run.labels, truth=truth, predicted=chances.argmax(-1), log_loss=float(-np.log(likely).mean()))


def report(outcome: Outcome) -> dict[str, Any]:
    """The numbers as JSON types.

    `macro_f1` is the mean over the classes that occur in truth or prediction; a class never predicted has precision 0.
    `confusion[i][j]` counts the rows of class i that were taken for class j. `majority` is the accuracy of saying the
    most frequent class of these rows.
    """
    table = confusion(outcome)
    rows, correct = len(outcome.truth), int(table.trace())
    classes = [_class(name, table, place) for place, name in enumerate(outcome.labels)]
    seen = [entry["f1"] for entry in classes if entry["rows"] or entry["predicted"]]
    return {
        "rows": rows,
        "accuracy": correct / rows,
        "accuracy_interval": list(wilson(correct, rows)),
        "majority": int(table.sum(1).max()) / rows,
        "macro_f1": sum(seen) / len(seen),
        "log_loss": outcome.log_loss,
        "classes": classes,
        "confusion": table.tolist(),
    }


def confusion(outcome: Outcome) -> np.ndarray:
    """(classes, classes), truth by prediction."""
    size = len(outcome.labels)
    pairs = outcome.truth * size + outcome.predicted
    return np.bincount(pairs, minlength=size * size).reshape(size, size)


def _class(name: str, table: np.ndarray, place: int) -> dict[str, Any]:
    hits, rows, predicted = int(table[place, place]), int(table[place].sum()), int(table[:, place].sum())
    return {
        "label": name,
        "rows": rows,
        "predicted": predicted,
        "precision": hits / predicted if predicted else 0.0,
        "recall": hits / rows if rows else 0.0,
        "f1": 2 * hits / (rows + predicted) if rows + predicted else 0.0,
    }


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's score method (1927), for independent rows.

    >>> tuple(round(bound, 4) for bound in wilson(90, 100))
    (0.8256, 0.9448)
    """
    share, square = correct / rows, _Z * _Z / rows
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / rows + square / (4 * rows)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare(ours: Outcome, theirs: Outcome, *, seed: int = 0) -> dict[str, Any]:
    """Accuracy of ours minus theirs in points on the same rows, with a paired bootstrap interval of 95%.

    Rows are drawn in pairs: each is won, lost or tied, so that a resample is one multinomial draw. The interval covers
    the choice of the rows, not the choice of a training seed.

    Raises:
        ConfigError: the two are not of the same rows and classes.
    """
    if set(ours.labels) != set(theirs.labels):
        raise ConfigError(f"the models have different classes: {ours.labels} and {theirs.labels}.")
    names, others = np.array(ours.labels)[ours.truth], np.array(theirs.labels)[theirs.truth]
    if len(names) != len(others) or (names != others).any():
        raise ConfigError("the two outcomes are of different rows; evaluate both on the same ones.")
    rows = len(names)
    won = int((ours.is_correct & ~theirs.is_correct).sum())
    lost = int((theirs.is_correct & ~ours.is_correct).sum())
    drawn = np.random.default_rng(seed).multinomial(rows, [won / rows, lost / rows, 1 - (won + lost) / rows], RESAMPLES)
    low, high = np.percentile(100 * (drawn[:, 0] - drawn[:, 1]) / rows, [2.5, 97.5])
    return {
        "points": 100 * (won - lost) / rows,
        "points_interval": [float(low), float(high)],
        "only_ours_right": won,
        "only_theirs_right": lost,
    }
