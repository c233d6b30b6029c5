"""Splits, labels, and data that cannot be learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.applications.classification.tiny import COLUMNS, make_rows, write_rows
from trilevel.applications.classification.data import (
    Columns,
    Data,
    check_classes,
    check_labels,
    clean,
    fingerprint,
    load_data,
    sort_labels,
    split_of,
)
from trilevel.errors import ConfigError, InputError

SPLIT = Columns(text="text", label="label", split="split")


def load(tmp_path: Path, rows: list[dict[str, Any]], columns: Columns = COLUMNS, **options: Any) -> Data:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return load_data(path, columns, **({"valid_fraction": 0.2} | options))


def texts(data: Data, split: str) -> list[str]:
    return [example.text for example in data.examples[split]]


def test_the_split_does_not_depend_on_the_order_and_keeps_every_row(tmp_path: Path) -> None:
    rows = make_rows()
    data, turned = load(tmp_path, rows), load(tmp_path, rows[::-1])
    assert {name: texts(data, name) for name in data.examples} == {
        name: texts(turned, name) for name in turned.examples
    }
    assert sorted(texts(data, "train") + texts(data, "valid")) == sorted(row["text"] for row in rows)
    assert 10 <= len(texts(data, "valid")) <= 38
    assert not texts(data, "test")


def test_a_text_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = make_rows()
    twins = [row | {"text": "  " + row["text"].upper().replace(" ", "\t ")} for row in rows]
    data = load(tmp_path, rows + twins)
    marks = [{fingerprint(text) for text in texts(data, name)} for name in ("train", "valid")]
    assert not marks[0] & marks[1]
    assert len(texts(data, "valid")) == 2 * len(marks[1])
    assert data.num_shared == 0


@given(st.text(), st.floats(0.01, 0.99))
def test_split_of_a_text_is_stable(text: str, fraction: float) -> None:
    assert split_of(fingerprint(f" {text} "), fraction) == split_of(fingerprint(text), fraction)
    # what is held out at a share is held out at a larger one
    if split_of(fingerprint(text), fraction) == "valid":
        assert split_of(fingerprint(text), min(1.0, 2 * fraction)) == "valid"


def test_the_split_column_decides(tmp_path: Path) -> None:
    names = ["train", "Validation", "test"]
    rows = [row | {"split": names[place % 3]} for place, row in enumerate(make_rows())]
    data = load(tmp_path, rows, SPLIT)
    for place, name in enumerate(("train", "valid", "test")):
        assert sorted(texts(data, name)) == sorted(row["text"] for row in rows[place::3])


def test_validation_rows_come_from_train_where_the_file_has_none(tmp_path: Path) -> None:
    rows = [row | {"split": "test" if place < 40 else "train"} for place, row in enumerate(make_rows())]
    data = load(tmp_path, rows, SPLIT)
    assert sorted(texts(data, "test")) == sorted(row["text"] for row in rows[:40])
    assert texts(data, "valid")
    assert len(texts(data, "valid")) + len(texts(data, "train")) == 80


def test_rows_that_the_file_has_on_both_sides_are_counted(tmp_path: Path) -> None:
    rows = make_rows()
    marked = [row | {"split": "train"} for row in rows] + [row | {"split": "test"} for row in rows[:7]]
    data = load(tmp_path, [*marked, {"text": "another one", "label": "pos", "split": "valid"}], SPLIT)
    assert data.num_shared == 7


def test_limit_takes_rows_of_every_split_whatever_their_order(tmp_path: Path) -> None:
    rows = make_rows()
    data, other = load(tmp_path, rows, limit=13), load(tmp_path, rows[::-1], limit=13)
    assert len(texts(data, "train")) == len(texts(data, "valid")) == 13
    assert texts(data, "train") == texts(other, "train")
    # not the first class alone, although the file may be sorted
    data = load(tmp_path, sorted(rows, key=lambda row: str(row["label"])), limit=20)
    assert min(data.counts("train").values()) >= 5


def test_rows_without_text_are_counted_and_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": text, "label": "pos"} for text in ("", "  \n", None)]
    data = load(tmp_path, [*make_rows(), *rows])
    assert data.num_empty == 3
    assert sum(map(len, data.examples.values())) == 120
    with pytest.raises(InputError, match="all 3 rows have an empty 'text'"):
        load(tmp_path, rows)


def test_labels_are_texts_numbers_and_truths(tmp_path: Path) -> None:
    labels = [" pos ", 3, 4.0, 0.5, True]
    data = load(tmp_path, [{"text": f"t{place}", "label": label} for place, label in enumerate(labels)])
    assert data.labels == ("0.5", "3", "4", "pos", "true")
    assert sort_labels({"10", "-2", "9"}) == ("-2", "9", "10")
    assert sort_labels({"--2", "10", "9"}) == ("--2", "10", "9")
    assert sort_labels({"9" * 5_000, "10"}) == ("10", "9" * 5_000)


@pytest.mark.parametrize("label", [None, "", "  ", float("nan")])
def test_a_missing_label_names_the_line(tmp_path: Path, label: object) -> None:
    rows = make_rows()
    rows[6]["label"] = label
    with pytest.raises(InputError, match=r"rows.jsonl:7: no label in column 'label'"):
        load(tmp_path, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": ["a"]}, "rows.jsonl:5: the label in 'label' is a list"),
        ({"text": 7}, "rows.jsonl:5: column 'text' holds a int"),
        ({"split": "dev2"}, "rows.jsonl:5: column 'split' says 'dev2'"),
        ({"split": 3}, "column 'split' says 3"),
    ],
)
def test_bad_values(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = [row | {"split": "train"} for row in make_rows()]
    rows[4] |= change
    with pytest.raises(InputError, match=message):
        load(tmp_path, rows, SPLIT)


def test_missing_columns(tmp_path: Path) -> None:
    for columns in (Columns(text="review", label="label"), Columns(text="text", label="review"), SPLIT):
        with pytest.raises(InputError, match=r"no column '.*'; the columns there are: 'text', 'label'"):
            load(tmp_path, make_rows(), columns)


def test_bad_options(tmp_path: Path) -> None:
    for options in ({"valid_fraction": 0.0}, {"valid_fraction": 1.0}, {"limit": 0}):
        with pytest.raises(ConfigError):
            load(tmp_path, make_rows(), **options)


def test_one_class_and_small_classes(tmp_path: Path) -> None:
    path = Path("rows.jsonl")
    with pytest.raises(InputError, match="all rows have the label 'pos'"):
        check_classes(load(tmp_path, [row for row in make_rows() if row["label"] == "pos"]), path)
    rows = [*make_rows(), *({"text": f"odd {place}", "label": "rare"} for place in range(5))]
    with pytest.raises(InputError, match=r"1 of 3 classes have fewer than 8 training rows: 'rare' has [1-5]"):
        check_classes(load(tmp_path, rows), path)
    scores = [{"text": row["text"], "label": place / 7} for place, row in enumerate(make_rows())]
    with pytest.raises(InputError, match="and 115 more classes"):
        check_classes(load(tmp_path, scores), path)
    with pytest.raises(InputError, match="too few to hold any out"):
        check_classes(load(tmp_path, make_rows(24), valid_fraction=1e-9), path)
    check_classes(load(tmp_path, make_rows()), path)


def test_unknown_labels(tmp_path: Path) -> None:
    examples = load(tmp_path, make_rows()).examples["train"]
    check_labels(examples, ("neg", "pos", "more"), Path("f"))
    with pytest.raises(InputError, match="f: unknown labels 'pos'; the model knows 'neg', 'x'"):
        check_labels(examples, ("neg", "x"), Path("f"))


def test_half_a_surrogate_pair_is_no_character() -> None:
    assert clean(" a\ud800b ") == "a?b"
    assert fingerprint(clean("\udcff")) == fingerprint("?")
