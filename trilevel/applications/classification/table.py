"""Rows of a CSV, TSV or JSONL file, plain or compressed; every error names the file and the line."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from trilevel.errors import InputError

MAX_FIELD_CHARACTERS = 1 << 24
"""Of one field; more is no text but a file in which something is not closed."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".xz")
KINDS = (*_DELIMITERS, *_JSON_LINES)

Row = tuple[str, Mapping[str, Any]]
"""Where it stands (`FILE:LINE`), and its values by column."""


def is_table(path: Path) -> bool:
    """Whether the name of a file says that it holds rows."""
    return _kind(path) in KINDS


def read_table(path: Path) -> Iterator[Row]:
    """The rows in the order of the file; blank lines are passed over.

    Raises:
        InputError: the file is missing, damaged, empty, not UTF-8, or not what its name says.
    """
    kind = _kind(path)
    if kind not in KINDS:
        raise InputError(
            f"{path}: unknown kind of file {kind or '(no suffix)'!r}. Known: {', '.join(KINDS)}, each also as "
            f"{' and '.join(_COMPRESSED)}. A table has a header line, JSONL one object a line."
        )
    with _opened(path) as stream:
        rows = _json_rows(stream, path) if kind in _JSON_LINES else _csv_rows(stream, path, _DELIMITERS[kind])
        is_empty = True
        for row in rows:
            is_empty = False
            yield row
    if is_empty:
        raise InputError(f"{path}: no rows in this file; a header line and rows, or one JSON object a line, is needed.")


def column(row: Row, name: str) -> Any:
    """The value of a column.

    Raises:
        InputError: the row has no such column; those it has are named.
    """
    where, values = row
    if name not in values:
        there = ", ".join(repr(key) for key in values) or "none"
        raise InputError(f"{where}: no column {name!r}; the columns there are: {there}.")
    return values[name]


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if path.is_dir():
        raise InputError(f"{path}: a directory; a file is needed.")
    # csv needs the ends of lines as they are; a byte order mark is no part of the first column's name
    options: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    try:
        with opener(path, **options) as stream:
            yield stream
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {error.object[error.start]:#04x}). Convert it, e.g. iconv -f latin1 -t utf-8."
        ) from error
    except (lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path}: damaged {path.suffix} file ({error}). Copy or make it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    for line in stream:
        if "\x00" in line:
            raise InputError(f"{path}: a binary file (it holds NUL bytes); text is needed.")
        yield line


def _json_rows(stream: TextIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream, path), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}). Each line is one object, e.g. {_EXAMPLE}.") from error
        if not isinstance(values, dict):
            raise InputError(f"{where}: a {type(values).__name__}, not an object such as {_EXAMPLE}.")
        longest = max((len(value) for value in values.values() if isinstance(value, str)), default=0)
        if longest > MAX_FIELD_CHARACTERS:
            raise InputError(f"{where}: a field of {longest:,} characters; at most {MAX_FIELD_CHARACTERS:,} are read.")
        yield where, values


_EXAMPLE = '{"text": "...", "label": "..."}'


def _csv_rows(stream: TextIO, path: Path, delimiter: str) -> Iterator[Row]:
    # strict: a quote that is never closed is an error, not one field with the rest of the file in it
    reader = csv.reader(_lines(stream, path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while (fields := _next(reader, path)) is not None:
        if not fields:
            continue
        where = f"{path}:{reader.line_num}"
        if header is None:
            header = _header(fields, where)
        elif len(fields) != len(header):
            raise InputError(
                f"{where}: {len(fields)} fields and the header has {len(header)}. Put quotes around a field that "
                "holds the delimiter, and write a quote within quotes twice."
            )
        else:
            yield where, dict(zip(header, fields, strict=True))


def _header(fields: list[str], where: str) -> list[str]:
    names = [name.strip() for name in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{where}: the header names {twice[0]!r} twice; every column needs a name of its own.")
    return names


def _next(reader: Any, path: Path) -> list[str] | None:
    """The next row; the limit is one for the whole process, so it is raised only while a row is read."""
    before = csv.field_size_limit(MAX_FIELD_CHARACTERS)
    try:
        return next(reader, None)
    except csv.Error as error:
        is_long = "field limit" in str(error)
        what = f"a field of more than {MAX_FIELD_CHARACTERS:,} characters" if is_long else f"not CSV ({error})"
        raise InputError(
            f"{path}:{reader.line_num}: {what}. Look for a quote that is not closed; quotes within quotes are written "
            "twice."
        ) from error
    finally:
        csv.field_size_limit(before)
