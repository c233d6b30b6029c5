"""The demo document: long enough, the same every time, and free of Sphinx's markup, code and tables."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

from trilevel.applications.documents.builtin import MIN_WORDS, builtin_document, clean
from trilevel.data.sentences import count_words
from trilevel.errors import InputError


def test_it_has_ten_thousand_words_without_its_headings_marks() -> None:
    document = builtin_document()
    words = count_words(document.text.replace("#", ""))
    assert MIN_WORDS <= words <= 1.5 * MIN_WORDS
    assert document.title.startswith("The Python language reference: Special method names")
    assert not document.abstract


def test_it_is_the_same_every_time() -> None:
    assert builtin_document() == builtin_document()


def test_no_markup_code_or_table_is_left() -> None:
    text = builtin_document().text
    for line in text.split("\n"):
        assert line == line.strip()
        assert not re.search(r"::=|>>>|^\+[-=]|^\||([*=~-])\1{4,}", line), line
    headings = [line for line in text.split("\n") if line.startswith("#")]
    assert headings[0] == "# Special method names"
    assert "##### object.__del__(self)" in headings
    assert 60 <= len(headings) <= 200


RAW = """The "x" statement
*****************

The *first* paragraph about "x()" is wrapped over
two lines, see section five. [2]

   x_stmt ::= "x" expression

for example:

   >>> x = 1
   >>> x.y

   while x:
       x = f(x.y)

An "x" clause
=============

object.__x__(self, a)
object.__y__(self, a)

   Called when an instance meets a zero-
   argument form of another instance of the class.

   * An item that runs
     on.

Mapping
   A finite set of objects.

+---------+
| table   |
+---------+

Changed in version 3.8: was y.

-[ Footnotes ]-

[2] Not so.
"""


def test_cleaning() -> None:
    assert clean(RAW).split("\n") == [
        "# The x statement",
        "The first paragraph about x() is wrapped over two lines, see section five.",
        "for example:",
        "## An x clause",
        "##### object.__x__(self, a), object.__y__(self, a)",
        "Called when an instance meets a zero-argument form of another instance of the class.",
        "- An item that runs on.",
        "Mapping: A finite set of objects.",
    ]


def fake_topics(monkeypatch: pytest.MonkeyPatch, topics: dict[str, str]) -> None:
    module = ModuleType("pydoc_data.topics")
    module.topics = topics  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)


def test_longest_chapters_come_first_and_the_last_ends_with_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    section = "\n\nPart {}\n======\n\n" + "word " * 7 + "end."
    long = "Long\n****" + "".join(section.format(number) for number in range(9))
    fake_topics(
        monkeypatch, {"short": "Short\n*****\n\nNo more.", "middle": "Middle\n******\n\n" + "word " * 40, "long": long}
    )
    text = builtin_document(min_words=19).text
    assert text.split("\n")[0] == "# Long"
    assert text.count("## Part") == 2
    assert [line for line in builtin_document(min_words=95).text.split("\n") if line.startswith("# ")] == [
        "# Long",
        "# Middle",
    ]


def test_a_python_without_the_topics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match=r"pydoc_data\.topics .*--doc"):
        builtin_document()


def test_too_few_words_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_topics(monkeypatch, {"one": "One\n***\n\nTwo three."})
    with pytest.raises(InputError, match="3 words; 10000 are needed"):
        builtin_document()
