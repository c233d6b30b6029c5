"""The demo document: chapters of the Python language reference that every CPython carries in `pydoc_data.topics`.

The text is plain text as Sphinx writes it: underlined headings, blocks between blank lines, code and grammar indented.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from textwrap import dedent

from trilevel.data.documents import Document
from trilevel.data.sentences import count_words
from trilevel.errors import InputError

MIN_WORDS = 10_000
PIECE_WORDS = 250
"""Of a piece, at least."""
SOURCE = "pydoc_data.topics"

# sphinx's characters under a heading, outermost first
_UNDERLINES = "*=-~"
_SIGNATURE = re.compile(r"(?:(?:class|classmethod|async|await) )?[\w.]+\(.*\)|[\w.]+\.__\w+__")
_ITEM = re.compile(r"\* |\d+\. ")
_EXTRA = re.compile(
    r"(?:New|Added|Changed|Deprecated)(?: in version| since version)|(?:Note|Warning|See also|Example)s?:$"
)
_CODE = re.compile(r"::=|>>>|^\s*(?:#|\.\.\.|\+[-=]+\+|\|)|^\s*(?:Traceback|\w+Error\b.*:)", re.MULTILINE)
_FOOTNOTE = re.compile(r"\s*\[\d+\]")
_FOOTNOTES = "-[ Footnotes ]-"


def builtin_document(*, min_words: int = MIN_WORDS) -> Document:
    """The longest chapters of the language reference, joined until there are `min_words` words.

    Code, grammar, tables and version notes are left out before words are counted, headings are `# ` lines and the
    signature of a method is a heading. The last chapter ends with the section in which `min_words` is reached. The same
    Python gives the same document.

    Raises:
        InputError: this Python carries no topics, or not enough of them.
    """
    lines: list[str] = []
    names: list[str] = []
    words = 0
    for _, raw in sorted(_topics().items(), key=lambda item: (-len(item[1]), item[0])):
        for number, line in enumerate(clean(raw).split("\n")):
            if words >= min_words and (number == 0 or line.startswith(("# ", "## "))):
                return _document(names, lines)
            if number == 0:
                names.append(line.lstrip("# "))
            lines.append(line)
            words += count_words(line.lstrip("# "))
    if words < min_words:
        raise InputError(
            f"pydoc_data.topics of this Python holds {words} words; {min_words} are needed. Give a file with --doc."
        )
    return _document(names, lines)


def builtin_pieces() -> list[Document]:
    """The same text as short documents, each of whole sections; for calibration and probes without a data set."""
    document = builtin_document()
    pieces: list[list[str]] = [[]]
    for line in document.text.split("\n"):
        if line.startswith("#") and len(" ".join(pieces[-1]).split()) >= PIECE_WORDS:
            pieces.append([])
        pieces[-1].append(line)
    return [
        Document(id=f"{document.id}:{number}", title="", text="\n".join(lines)) for number, lines in enumerate(pieces)
    ]


def _document(names: list[str], lines: list[str]) -> Document:
    title = "The Python language reference: " + ", ".join([names[0], *(name.lower() for name in names[1:])])
    return Document(id=SOURCE, title=title, text="\n".join(lines), source=SOURCE)


def _topics() -> Mapping[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python carries no pydoc_data.topics (a cut-down build); install the full standard library "
            "(Debian, Ubuntu: apt install libpython3-stdlib) or give a file with --doc."
        ) from error
    return topics  # type: ignore[no-any-return, unused-ignore]


def clean(raw: str) -> str:
    """One topic as text with `# ` heading lines, one paragraph a line.

    >>> print(clean(chr(10).join(["Pass", "****", "", "   pass_stmt ::= x", "", '"pass" is a null', "operation."])))
    # Pass
    pass is a null operation.
    """
    body = raw.partition(_FOOTNOTES)[0]
    blocks = (block for block in re.split(r"\n(?:[ ]*\n)+", body.strip("\n")) if block.strip())
    return "\n".join(line for block in blocks for line in _lines(block))


def _lines(block: str) -> Iterator[str]:
    is_indented = block.startswith(" ")
    lines = dedent(block).rstrip().split("\n")
    if len(lines) > 1 and lines[1][0] in _UNDERLINES and lines[1] == lines[1][0] * len(lines[1]):
        yield f"{'#' * (1 + _UNDERLINES.index(lines[1][0]))} {_plain(lines[0])}"
        lines = lines[2:]
    text = "\n".join(lines)
    if not lines or _EXTRA.match(text) or _CODE.search(text):
        return
    if all(_SIGNATURE.fullmatch(line) for line in lines):
        yield "##### " + _plain(", ".join(lines))
    elif not is_indented or _is_prose(text):
        yield _paragraph(lines)


def _paragraph(lines: list[str]) -> str:
    if _ITEM.match(lines[0]):
        return _ITEM.sub(lambda mark: "- " if mark[0] == "* " else mark[0], _plain(_joined(lines)), count=1)
    is_term = len(lines) > 1 and lines[1].startswith("  ") and not lines[0].endswith((".", ":", ","))
    return _plain(f"{lines[0]}: {_joined(lines[1:])}" if is_term else _joined(lines))


def _joined(lines: list[str]) -> str:
    # a word with a hyphen may be cut behind it
    return re.sub(r"(?<=\w)-\n(?=\w)", "-", "\n".join(line.strip() for line in lines))


def _is_prose(text: str) -> bool:
    """An indented block is prose if it begins and ends as a sentence does and most of it is words, else code."""
    words = text.split()
    plain = sum(re.sub(r"[\W_]", "", word).isalpha() and "(" not in word[1:] for word in words)
    begins = not text[0].islower()
    return begins and len(words) >= 5 and text[-1] in ".:!?;)" and plain >= 0.6 * len(words)


def _plain(text: str) -> str:
    """Without Sphinx's quotes around code, emphasis and footnote marks."""
    text = _FOOTNOTE.sub("", text)
    text = re.sub(r"‘\"([^\"]+)\"’|\"([^\"]+)\"", r"\1\2", text)
    text = re.sub(r"(?<![\w*])\*{1,2}(\w[^*\n]*?)\*{1,2}(?![\w*])", r"\1", text)
    return " ".join(text.split())
