"""Texts with labels, from a table to splits in which no text is on both sides."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trilevel.applications.classification.table import Row, column, read_table
from trilevel.data.token_rows import characters
from trilevel.errors import ConfigError, InputError

SPLITS = ("train", "valid", "test")
MIN_ROWS_OF_CLASS = 8
"""Training rows that a class needs."""

_SPLIT_NAMES = {name: name for name in SPLITS} | {"validation": "valid", "val": "valid", "dev": "valid"}
_SHOWN = 5
# of a length that int reads
_WHOLE = re.compile(r"-?\d{1,300}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; without `split` the text decides, see `split_of`."""

    text: str
    label: str
    split: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row: its text, its label, and the split it is in."""

    text: str
    label: str
    split: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The rows of a file.

    Attributes:
        examples: rows by split, each in the order of `fingerprint`.
        labels: of all of them, sorted: as numbers if all are whole numbers, else as text.
        num_empty: rows without text, which were left out.
        num_shared: rows of `valid` and `test` whose text is in `train` too; only the file's own split can do that.
    """

    examples: Mapping[str, Sequence[Example]]
    labels: tuple[str, ...]
    num_empty: int
    num_shared: int

    def counts(self, split: str) -> dict[str, int]:
        """Rows of each class in a split."""
        found = Counter(example.label for example in self.examples[split])
        return {label: found[label] for label in self.labels}


def load_data(path: Path, columns: Columns, *, valid_fraction: float, limit: int | None = None) -> Data:
    """Read a table and split it.

    A split column says train, valid (validation, val, dev) or test; where no row says valid, it is taken from train as
    if there were no such column. `limit` keeps that many rows of each split: those with the lowest fingerprints, which
    depend on neither the order of the file nor the labels.

    Raises:
        InputError: the file cannot be read, a column or a label is missing, or a split has an unknown name.
        ConfigError: `valid_fraction` or `limit` is out of range.
    """
    if not 0 < valid_fraction < 1:
        raise ConfigError(f"valid_fraction={valid_fraction} must lie between 0 and 1.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be >= 1.")
    rows = [_example(row, columns) for row in read_table(path)]
    found = [row for row in rows if row is not None]
    if not found:
        raise InputError(f"{path}: all {len(rows)} rows have an empty {columns.text!r}; nothing to learn from.")
    marked = [(fingerprint(example.text), example) for example in found]
    if not any(example.split == "valid" for example in found):
        marked = [(mark, _with_split(example, mark, valid_fraction)) for mark, example in marked]
    # not by example: rows of one text stay in the order of the file
    marked.sort(key=lambda pair: pair[0])
    trained = {mark for mark, example in marked if example.split == "train"}
    shared = sum(mark in trained for mark, example in marked if example.split != "train")
    examples = {split: [example for _, example in marked if example.split == split][:limit] for split in SPLITS}
    return Data(
        examples=examples,
        labels=sort_labels({example.label for example in found}),
        num_empty=len(rows) - len(found),
        num_shared=shared,
    )


def check_classes(data: Data, path: Path) -> None:
    """Raise `InputError` unless there are two classes or more, each with rows to learn from, and rows to validate."""
    if len(data.labels) < 2:
        raise InputError(
            f"{path}: all rows have the label {data.labels[0]!r}; at least two classes are needed. "
            "Check the label column."
        )
    few = {label: count for label, count in data.counts("train").items() if count < MIN_ROWS_OF_CLASS}
    if few:
        named = ", ".join(f"{label!r} has {count}" for label, count in list(few.items())[:_SHOWN])
        more = f" and {len(few) - _SHOWN} more classes" if len(few) > _SHOWN else ""
        raise InputError(
            f"{path}: {len(few)} of {len(data.labels)} classes have fewer than {MIN_ROWS_OF_CLASS} training rows: "
            f"{named}{more}. Add rows, join classes, or raise --limit; is it the right label column?"
        )
    if not data.examples["valid"]:
        raise InputError(
            f"{path}: {len(data.examples['train'])} rows are too few to hold any out for validation; add rows, or a "
            "split column that says train, valid and test."
        )


def check_labels(examples: Sequence[Example], labels: Sequence[str], path: Path) -> None:
    """Raise `InputError` if a row has a label that the model does not know."""
    unknown = sort_labels({example.label for example in examples} - set(labels))
    if unknown:
        raise InputError(
            f"{path}: unknown labels {', '.join(map(repr, unknown[:_SHOWN]))}; the model knows "
            f"{', '.join(map(repr, labels))}."
        )


def fingerprint(text: str) -> int:
    """64 bits of a text, the same for texts that differ in case and white space only.

    >>> fingerprint("A  good film") == fingerprint("a good film ")
    True
    """
    plain = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.sha256(plain.encode()).digest()[:8], "big")


def split_of(mark: int, valid_fraction: float) -> str:
    """`valid` for the lowest fingerprints, `train` for the others: equal texts are never on both sides."""
    return "valid" if mark < valid_fraction * 2**64 else "train"


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """In order of number if all are whole numbers, else of text.

    >>> sort_labels({"10", "9"}), sort_labels({"10", "9", "x"})
    (('9', '10'), ('10', '9', 'x'))
    """
    are_numbers = all(_WHOLE.fullmatch(label) for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label), label))) if are_numbers else tuple(sorted(labels))


def text_of(row: Row, name: str) -> str:
    """The text in a column, empty if there is none.

    Raises:
        InputError: the row has no such column, or what stands there is no text.
    """
    value = column(row, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{row[0]}: column {name!r} holds a {type(value).__name__}; a text is needed.")
    return clean(value)


def clean(text: str) -> str:
    """Without white space around it, and without what is no character."""
    return characters(text.strip())


def _example(row: Row, columns: Columns) -> Example | None:
    """An example whose split is still the file's; None if it has no text."""
    text = text_of(row, columns.text)
    label = _label(row, columns.label)
    split = "train" if columns.split is None else _split(row, columns.split)
    return Example(text=text, label=label, split=split) if text else None


def _label(row: Row, name: str) -> str:
    value: Any = column(row, name)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else repr(value)
    if isinstance(value, (int, str)) and clean(str(value)):
        return clean(str(value))
    if isinstance(value, (list, dict)):
        raise InputError(f"{row[0]}: the label in {name!r} is a {type(value).__name__}; a text or a number is needed.")
    raise InputError(f"{row[0]}: no label in column {name!r}. Give the row one, or take the row out.")


def _split(row: Row, name: str) -> str:
    value = column(row, name)
    split = _SPLIT_NAMES.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise InputError(f"{row[0]}: column {name!r} says {value!r}; train, valid or test is needed.")
    return split


def _with_split(example: Example, mark: int, valid_fraction: float) -> Example:
    return replace(example, split=split_of(mark, valid_fraction)) if example.split == "train" else example
