"""Metrics against scikit-learn or by hand, intervals, and the rows that are held out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.applications.classification.tiny import make_rows, train_tiny, write_rows
from trilevel.applications.classification.checkpoint import Run
from trilevel.applications.classification.data import fingerprint, load_data
from trilevel.applications.classification.evaluate import (
    Outcome,
    check_comparable,
    compare,
    evaluate,
    held_out,
    report,
    wilson,
)
from trilevel.errors import ConfigError, InputError
from trilevel.model.folder import sha256_of

LABELS = ("a", "b", "c", "never")


def outcome(truth: list[int], predicted: list[int], labels: tuple[str, ...] = LABELS) -> Outcome:
    return Outcome(labels=labels, truth=np.array(truth), predicted=np.array(predicted), log_loss=0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_tiny(tmp_path_factory.mktemp("classification")).run


def test_numbers_by_hand() -> None:
    found = report(outcome([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]))
    assert found["rows"] == 6
    assert found["accuracy"] == 0.5
    assert found["majority"] == 0.5
    assert found["confusion"] == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    a, b, c, never = found["classes"]
    assert (a["precision"], a["recall"], a["f1"]) == (0.5, pytest.approx(2 / 3), pytest.approx(4 / 7))
    assert (b["precision"], b["recall"], b["f1"]) == (0.5, 0.5, 0.5)
    assert (c["rows"], c["predicted"], c["precision"], c["f1"]) == (1, 0, 0.0, 0.0)
    assert (never["rows"], never["recall"]) == (0, 0.0)
    # a class that neither is there nor was said does not count
    assert found["macro_f1"] == pytest.approx((4 / 7 + 0.5 + 0) / 3)


def test_f1_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, 101).tolist(), rng.integers(0, 3, 101).tolist()
    found = report(outcome(truth, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))
    assert found["confusion"][0][:3] == metrics.confusion_matrix(truth, predicted)[0].tolist()


def test_wilson_holds_the_share_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for share in (0.5, 0.93):
        inside = [low <= share <= high for low, high in (wilson(int(k), 60) for k in rng.binomial(60, share, 2_000))]
        assert 0.93 < np.mean(inside) < 0.97
    assert wilson(0, 5)[0] == 0
    assert wilson(5, 5)[1] == 1


def test_comparison_is_paired() -> None:
    truth = [0, 1] * 50
    theirs = [0, 1] * 45 + [1, 0] * 5
    better = theirs[:90] + [0, 1] * 4 + [1, 0]
    found = compare(outcome(truth, better), outcome(truth, theirs))
    assert found["points"] == pytest.approx(8.0)
    assert (found["only_ours_right"], found["only_theirs_right"]) == (8, 0)
    low, high = found["points_interval"]
    # 8 of 100 rows won: half as wide as for two independent samples, and never below zero
    assert 2 <= low <= 4
    assert 12 <= high <= 15
    assert compare(outcome(truth, theirs), outcome(truth, better))["points"] == pytest.approx(-8.0)
    assert compare(outcome(truth, theirs), outcome(truth, theirs))["points_interval"] == [0.0, 0.0]


def test_comparison_by_name_not_by_place() -> None:
    ours = outcome([0, 1, 1], [0, 1, 0], ("a", "b"))
    theirs = outcome([1, 0, 0], [1, 0, 1], ("b", "a"))
    assert compare(ours, theirs)["points"] == 0
    with pytest.raises(ConfigError, match="different rows"):
        compare(ours, outcome([0, 1, 1], [1, 0, 1], ("b", "a")))
    with pytest.raises(ConfigError, match="different classes"):
        compare(ours, outcome([0, 1, 1], [0, 1, 1], ("a", "c")))


def test_rows_of_training_are_not_evaluated_on(run: Run) -> None:
    data = load_data(Path(run.origin.path), run.origin.columns, valid_fraction=run.origin.valid_fraction)
    trained = {fingerprint(example.text) for example in data.examples["train"]}
    for path in (None, Path(run.origin.path)):
        rows = held_out(run, path)
        assert rows.split == "valid"
        assert len(rows.examples) == len(data.examples["valid"])
        assert not trained & {fingerprint(example.text) for example in rows.examples}
    assert {fingerprint(example.text) for example in held_out(run, split="train").examples} == trained
    assert len(held_out(run, limit=3).examples) == 3


def test_all_rows_of_another_file(run: Run, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [*make_rows(50, seed=1), {"text": "", "label": "pos"}])
    rows = held_out(run, other)
    assert (rows.split, len(rows.examples), rows.num_empty) == ("all", 50, 1)
    assert 0 < len(held_out(run, other, split="valid").examples) < 50
    assert report(evaluate(run, rows.examples))["accuracy"] > 0.7


def test_what_cannot_be_evaluated(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row in the split 'test'"):
        held_out(run, split="test")
    with pytest.raises(ConfigError, match="split='dev' is none of"):
        held_out(run, split="dev")
    with pytest.raises(InputError, match="unknown labels 'odd'"):
        held_out(run, write_rows(tmp_path / "odd.jsonl", [{"text": "a", "label": "odd"}]))
    with pytest.raises(InputError, match="no such file"):
        held_out(run, tmp_path / "none.csv")
    moved = replace(run, origin=replace(run.origin, path=str(tmp_path / "gone.jsonl")))
    with pytest.raises(InputError, match=r"no longer there\. Name the file"):
        held_out(moved)


def test_runs_that_cannot_be_compared(run: Run, tmp_path: Path) -> None:
    rows = held_out(run)
    check_comparable(run, run, rows)
    with pytest.raises(ConfigError, match="split by another rule"):
        check_comparable(run, replace(run, origin=replace(run.origin, valid_fraction=0.1)), rows)
    other_text = replace(run.origin, columns=replace(run.origin.columns, text="title"))
    with pytest.raises(ConfigError, match="split by another rule"):
        check_comparable(run, replace(run, origin=other_text), rows)
    # on another file both are strangers, unless one was trained on it
    other = held_out(run, write_rows(tmp_path / "other.jsonl", make_rows(9, seed=5)))
    check_comparable(run, replace(run, origin=replace(run.origin, valid_fraction=0.1)), other)
    theirs = replace(run, origin=replace(run.origin, sha256=sha256_of(other.path)))
    with pytest.raises(ConfigError, match=r"was trained on .*other\.jsonl, so it knows the rows"):
        check_comparable(run, theirs, other)
