"""Tables: what is read, and what every bad file says."""

from __future__ import annotations

import csv
import gzip
import lzma
from pathlib import Path

import pytest

from trilevel.applications.classification import table
from trilevel.applications.classification.table import column, is_table, read_table
from trilevel.errors import InputError

CSV = 'text,label\r\n"one, ""two""\nthree",a\r\n\r\nfour,b\r\n'
ROWS = [{"text": 'one, "two"\nthree', "label": "a"}, {"text": "four", "label": "b"}]


def values(path: Path) -> list[dict[str, object]]:
    return [dict(row) for _, row in read_table(path)]


def test_csv_with_quotes_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.CSV"
    path.write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    assert values(path) == [
        {"text": 'one, "two"\nthree', "label": "a"},
        {"text": "four", "label": "b"},
    ]
    assert [where for where, _ in read_table(path)] == [f"{path}:3", f"{path}:5"]


def test_tsv(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\none, two\ta\n")
    assert values(path) == [{"text": "one, two", "label": "a"}]


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "r.jsonl.gz", "r.jsonl.xz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    data = '\ufeff{"text": "a", "label": 1}\n\n{"text": "ü"}\n'.encode()
    packed = {".gz": gzip.compress(data), ".xz": lzma.compress(data)}
    (tmp_path / name).write_bytes(packed.get(Path(name).suffix, data))
    assert values(tmp_path / name) == [{"text": "a", "label": 1}, {"text": "ü"}]


@pytest.mark.parametrize("name", ["r.csv.gz", "r.csv.xz"])
def test_compressed_csv(tmp_path: Path, name: str) -> None:
    compress = gzip.compress if name.endswith("gz") else lzma.compress
    (tmp_path / name).write_bytes(compress(CSV.encode()))
    assert values(tmp_path / name) == ROWS


def test_names() -> None:
    assert is_table(Path("a/b.v2.csv.gz"))
    assert not is_table(Path("a/b.csv.zip"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "no rows"),
        ("empty.jsonl", b" \n\n", "no rows"),
        ("header.csv", b"text,label\n", "no rows"),
        ("r.json", b"[]", "unknown kind of file '.json'"),
        ("r", b"text", r"unknown kind of file '\(no suffix\)'"),
        ("latin.csv", b"text,label\ncaf\xe9,a\n", "not UTF-8 .byte 0xe9"),
        ("latin.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("utf16.csv", "text,label\n".encode("utf-16-le"), "binary"),
        ("binary.jsonl", b"\x00\x01", "binary"),
        ("r.jsonl", b'{"text": "a"}\n{"text"\n', r"r.jsonl:2: not JSON"),
        ("array.jsonl", b"[1]\n", r"array.jsonl:1: a list"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", r"deep.jsonl:1: not JSON"),
        ("open.csv", b'text,label\n"never closed,a\nb,c\n', r"open.csv:\d: not CSV"),
        ("more.csv", b"text,label\na,b,c\n", r"more.csv:2: 3 fields and the header has 2"),
        ("fewer.csv", b"text,label\na\n", "1 fields and the header has 2"),
        ("twice.csv", b"text,text\na,b\n", "names 'text' twice"),
        ("damaged.csv.xz", b"no xz", "damaged .xz"),
        ("damaged.csv.gz", b"no gz", "damaged .gz"),
        ("short.csv.gz", gzip.compress(CSV.encode() * 99, mtime=0)[:-20], "damaged .gz"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        values(path)


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        values(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="a directory"):
        values(tmp_path / "folder.csv")


@pytest.mark.parametrize(("name", "content"), [("r.csv", "text\n{}\n"), ("r.jsonl", '{{"text": "{}"}}\n')])
def test_huge_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str) -> None:
    # above the limit that csv has by itself
    path = tmp_path / name
    path.write_text(content.format("a" * 200_003))
    before = csv.field_size_limit()
    assert len(str(values(path)[0]["text"])) == 200_003
    assert csv.field_size_limit() == before
    monkeypatch.setattr(table, "MAX_FIELD_CHARACTERS", 200_002)
    with pytest.raises(InputError, match=r"field of .*200,00\d characters"):
        values(path)
    assert csv.field_size_limit() == before


def test_a_missing_column_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"f:3: no column 'review'; the columns there are: 'text', 'label'"):
        column(("f:3", {"text": "a", "label": "b"}), "review")
