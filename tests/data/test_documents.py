"""Documents: rows of a data set, files of every kind, and every bad input."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import pytest

from trilevel.data import readers
from trilevel.data.documents import load_jsonl, read_file
from trilevel.errors import InputError, MissingExtraError

ROW = {"id": "a", "title": "T", "text": "# H\nOne sentence.", "abstract": "Sum.", "split": "train"}


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows_are_read_and_split_and_limited(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", [ROW, {**ROW, "id": "b", "split": "test"}, "", {**ROW, "id": "c"}])
    assert [d.id for d in load_jsonl(path)] == ["a", "b", "c"]
    assert [d.id for d in load_jsonl(path, split="train")] == ["a", "c"]
    assert [d.id for d in load_jsonl(path, split="train", limit=1)] == ["a"]
    assert load_jsonl(path)[0].abstract == "Sum."


def test_xz_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.xz"
    path.write_bytes(lzma.compress(json.dumps(ROW).encode()))
    assert load_jsonl(path)[0].title == "T"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{no json", r":2: not JSON"),
        ([1], r":2: a list, not an object"),
        ({**ROW, "text": ""}, r":2: field 'text' is missing or empty"),
        ({"id": "x"}, r":2: field 'text' is missing or empty"),
        ({**ROW, "title": 5}, r":2: field 'title' is a int"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_jsonl(write_rows(tmp_path / "d.jsonl", [ROW, row]))


def test_bad_data_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="a directory"):
        load_jsonl(tmp_path)
    with pytest.raises(InputError, match="no document of the split 'test'"):
        load_jsonl(write_rows(tmp_path / "d.jsonl", [ROW]), split="test")
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(InputError, match="damaged xz"):
        load_jsonl(tmp_path / "cut.jsonl.xz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        load_jsonl(tmp_path / "latin.jsonl")


MARKDOWN = """---
layout: page
---
# Levels *of* attention

One line
wrapped here. See [the link](http://x).

```python
code()
```

| a | b |
|---|---|
| 1 | 2 |

- item one
- item two

## Second `part`

    indented code

<div>raw</div>
"""
RST = """
Levels
======

One line
wrapped here.

.. code-block:: python

   code()

::

   literal

Second
------

- item one

.. include:: /etc/passwd

===  ===
a    b
===  ===
1    2
===  ===
"""
HTML = """<html><head><title>The title</title><style>p{}</style></head><body><nav>menu</nav>
<h1>Levels</h1><p>One line <b>wrapped</b> here.</p><pre>code()</pre><table><tr><td>1</td></tr></table>
<div>Loose text<p>inner</p></div><ul><li>item one</li></ul><script>bad()</script><h2>Second</h2></body></html>"""
TEXT = """Levels
******

One line
wrapped here.

   code = 1
   more_code()

Second
======

* item one
* item two
"""


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        (
            ".md",
            MARKDOWN,
            ["# Levels of attention", "One line wrapped here. See the link.", "item one", "item two", "## Second part"],
        ),
        (".rst", RST, ["# Levels", "One line wrapped here.", "# Second", "item one"]),
        (
            ".html",
            HTML,
            ["# Levels", "One line wrapped here.", "Loose text", "inner", "item one", "## Second"],
        ),
        (".txt", TEXT, ["# Levels", "One line wrapped here.", "# Second", "* item one", "* item two"]),
    ],
)
def test_headings_and_paragraphs_stay_code_and_tables_go(
    tmp_path: Path, suffix: str, content: str, expected: list[str]
) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_text(content, encoding="utf-8")
    document = read_file(path)
    lines = document.text.split("\n")
    assert lines == expected
    assert document.title == ("The title" if suffix == ".html" else expected[0].lstrip("# "))
    for gone in ("code", "raw", "menu", "bad()", "root:", "literal"):
        assert gone not in document.text


def test_rst_with_unknown_roles_and_directives_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.rst"
    path.write_text("A sentence with :unknown:`a role` stays.\n\n.. nodirective:: x\n\n   gone\n\nThe end.\n")
    assert read_file(path).text.endswith("The end.")
    assert capsys.readouterr().err == ""


def test_windows_line_ends_byte_order_mark_and_chinese_wrapping(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes("\ufeff多级注意\r\n力机制。\r\n\r\nSecond one.".encode())
    assert read_file(path).text == "多级注意力机制。\nSecond one."


def test_pdf_is_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "d.pdf"
    path.write_bytes(small_pdf("One sentence in a page."))
    assert "One sentence in a page." in read_file(path).text


def small_pdf(text: str) -> bytes:
    """A PDF of one page, written by hand."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 99 99] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(out)
    return (
        out
        + b"xref\n0 6\n0000000000 65535 f \n"
        + table
        + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % start
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty file"),
        ("spaces.md", b" \n\t\n", "empty file"),
        ("binary.txt", b"ab\x00cd", "binary file"),
        ("latin.txt", b"caf\xe9 noir", r"not UTF-8 \(byte 0xe9 at offset 3\)"),
        ("d.docx", b"text", r"unknown kind of file '\.docx'"),
        ("README", b"text", r"\(no suffix\)"),
        ("code.md", b"```\ncode\n```\n", "no text in this file"),
        ("bad.pdf", b"%PDF-1.4 broken", "not a readable PDF"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_file(path)


def test_missing_file_directory_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_file(tmp_path / "none.txt")
    with pytest.raises(InputError, match="a directory"):
        read_file(tmp_path)
    path = tmp_path / "closed.txt"
    path.write_text("text")

    def refuse(self: Path) -> bytes:
        # root reads whatever its permissions say, so the refusal is played
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match="cannot be read"):
        read_file(path)


def test_a_file_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilevel.data.documents.MAX_FILE_BYTES", 7)
    path = tmp_path / "d.txt"
    path.write_text("over seven bytes")
    with pytest.raises(InputError, match="16 bytes; at most 7"):
        read_file(path)


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "markdown_it", None)
    path = tmp_path / "d.md"
    path.write_text("# T\ntext")
    with pytest.raises(MissingExtraError, match=r"trilevel\[readers\]"):
        read_file(path)


@pytest.mark.parametrize("text", ["", " \n\n\t\n", "\n"])
def test_a_text_without_a_word_has_no_lines(text: str) -> None:
    # a file of it is refused before; a body of a request is not
    assert readers.read_text(text).text == ""
