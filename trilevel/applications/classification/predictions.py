"""From texts, files and tables to what a model says of them, whichever runtime computes; without torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy.typing as npt

from trilevel.applications.classification.data import clean, text_of
from trilevel.applications.classification.table import KINDS, is_table, read_table
from trilevel.data.documents import read_file
from trilevel.data.json_lines import STDIN, read_lines
from trilevel.data.readers import READERS
from trilevel.errors import InputError

_ROWS_AT_ONCE = 1_024
_DOCUMENTS = (*READERS, ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A text, and where it is from: a file, `FILE:LINE`, or empty for one that was given as it is."""

    where: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the model says of an item: a label, and the softmax over all labels by name; neither for an empty text."""

    item: Item
    label: str | None
    probabilities: dict[str, float] | None


def items(inputs: Sequence[str], *, text_column: str) -> Iterator[Item]:
    """The texts behind the arguments of a command: a file where there is one, else the argument itself.

    `-` is standard input, JSON texts or objects with `text_column`, one a line.

    Raises:
        InputError: a file cannot be read, a table has no column `text_column`, or an argument is empty or looks like
            the name of a file that is not there.
    """
    for given in inputs:
        path = Path(given)
        if given == STDIN:
            yield from map(partial(_of_line, text_column), read_lines(sys.stdin))
        elif not clean(given):
            raise InputError("an empty text; give one with at least one word, or a file.")
        elif is_table(path) and (is_there(path) or not _has_space(given)):
            yield from (Item(where=row[0], text=text_of(row, text_column)) for row in read_table(path))
        elif is_there(path) or (path.suffix.lower() in _DOCUMENTS and not _has_space(given)):
            yield Item(where=given, text=clean(_document(path)))
        else:
            yield Item(where="", text=clean(given))


def _of_line(text_column: str, line: tuple[str, Any]) -> Item:
    where, value = line
    if isinstance(value, str):
        return Item(where=where, text=clean(value))
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: a {type(value).__name__}; a text or an object with {text_column!r} is needed.")
    return Item(where=where, text=text_of((where, value), text_column))


def predictions(
    wanted: Iterator[Item], labels: Sequence[str], classify: Callable[[list[str]], npt.NDArray[Any]]
) -> Iterator[Prediction]:
    """Predictions in the order of the items; a thousand are read at a time, so a table may be of any length.

    Args:
        wanted: items; one without text has no class.
        labels: in the order of the classes.
        classify: texts to probabilities (texts, classes).
    """
    while some := list(islice(wanted, _ROWS_AT_ONCE)):
        texts = [item.text for item in some if item.text]
        chances = iter(classify(texts) if texts else ())
        for item in some:
            yield _prediction(labels, item, next(chances) if item.text else None)


def _prediction(labels: Sequence[str], item: Item, chances: npt.NDArray[Any] | None) -> Prediction:
    if chances is None:
        return Prediction(item=item, label=None, probabilities=None)
    named = dict(zip(labels, chances.tolist(), strict=True))
    return Prediction(item=item, label=labels[int(chances.argmax())], probabilities=named)


def _document(path: Path) -> str:
    if path.suffix.lower() in _DOCUMENTS or not path.is_file():
        return read_file(path).text
    raise InputError(
        f"{path}: unknown kind of file {path.suffix or '(no suffix)'!r}. Known: {', '.join((*_DOCUMENTS, *KINDS))}. "
        "Rename or convert it."
    )


def _has_space(given: str) -> bool:
    return any(character.isspace() for character in given)


def is_there(path: Path) -> bool:
    """Whether a file or folder is there; what is too long for a name is none."""
    try:
        return path.exists()
    # a text may be too long for a name
    except (OSError, ValueError):
        return False
