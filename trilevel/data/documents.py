"""Documents: what a summary is made from, and how one is read from a file or a data set.

Text keeps one convention everywhere: a line that starts with `#` is a heading, every other line is a paragraph, code
blocks and tables are left out.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trilevel.data import readers
from trilevel.errors import InputError

MAX_FILE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document: `text` with `# ` heading lines, and the reference `abstract` where there is one.

    `split` is `train`, `valid`, `test` or empty; `source` names where the document comes from.
    """

    id: str
    title: str
    text: str
    abstract: str = ""
    source: str = ""
    split: str = ""


def load_jsonl(path: str | Path, *, split: str | None = None, limit: int | None = None) -> list[Document]:
    """Read documents from a `.jsonl` or `.jsonl.xz` file with one object {id, title, text, abstract} a line.

    `split` keeps the rows of one split; `limit` stops after that many.

    Raises:
        InputError: the file is missing, damaged or empty, or a row is not such an object (the line is named).
    """
    path = Path(path)
    found: list[Document] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        document = _row(line, f"{path}:{number}")
        if split is None or document.split == split:
            found.append(document)
        if limit is not None and len(found) >= limit:
            break
    if not found:
        which = "document" if split is None else f"document of the split {split!r}"
        raise InputError(f"{path}: no {which} in this file; one JSON object a line is needed.")
    return found


def _lines(path: Path) -> Iterator[str]:
    _check_regular(path)
    try:
        if path.suffix == ".xz":
            with lzma.open(path, "rt", encoding="utf-8") as stream:
                yield from stream
        else:
            with path.open(encoding="utf-8") as stream:
                yield from stream
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: damaged xz file ({error}). Copy or make the file again.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}). Convert the file to UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _row(line: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{where}: not JSON ({error}). Each line is one object {{id, title, text, abstract}}."
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not an object {{id, title, text, abstract}}.")
    values: dict[str, str] = {}
    for name in ("id", "title", "text", "abstract", "source", "split"):
        value = row.get(name, "")
        if not isinstance(value, str):
            raise InputError(f"{where}: field {name!r} is a {type(value).__name__}; a string is needed.")
        values[name] = value
    if not values["text"].strip():
        raise InputError(f"{where}: field 'text' is missing or empty; it holds the document's text.")
    return Document(**{**values, "id": values["id"] or where})


def read_file(path: str | Path) -> Document:
    """Read one txt, md, rst, html or pdf file as a `Document`; headings become `# ` lines, code and tables go.

    Raises:
        InputError: the file is missing, a directory, unreadable, empty, binary, not UTF-8 or of another kind.
        MissingExtraError: the format's library is not installed (extra `readers`).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    data = _bytes(path)
    if suffix == ".pdf":
        content = readers.read_pdf(data, where=str(path))
    elif suffix in readers.READERS:
        content = readers.READERS[suffix](_decode(data, path))
    else:
        known = ", ".join(sorted([*readers.READERS, ".pdf"]))
        raise InputError(f"{path}: unknown kind of file {suffix or '(no suffix)'!r}. Known: {known}. Convert it first.")
    if not content.text.strip():
        raise InputError(f"{path}: no text in this file once code and tables are left out; nothing to summarise.")
    return Document(id=str(path), title=content.title, text=content.text, source=str(path))


def _check_regular(path: Path) -> None:
    try:
        if path.is_dir():
            raise InputError(f"{path}: a directory; a file is needed. Name the files in it, e.g. {path}/*.md.")
        if not path.exists():
            raise InputError(f"{path}: no such file. Check the path.")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _bytes(path: Path) -> bytes:
    _check_regular(path)
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {size} bytes; at most {MAX_FILE_BYTES} are read. Split the file.")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    if not data.strip():
        raise InputError(f"{path}: empty file; a document with at least one word is needed.")
    return data


def _decode(data: bytes, path: Path) -> str:
    if b"\x00" in data:
        raise InputError(f"{path}: a binary file (it holds NUL bytes); text is needed. Convert it to text, md or html.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}). "
            f"Convert it, e.g. iconv -f latin1 -t utf-8."
        ) from error
