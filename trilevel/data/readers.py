"""One reader for each kind of file: from its markup to plain text with `# ` heading lines.

Each takes the decoded text (the PDF reader: bytes) and returns a `Content`. Markup is parsed by a library of the extra
`readers`; plain text needs none.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trilevel.errors import InputError, require

# characters that libraries pass on but that mean nothing in a sentence
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff\u00ad]")
_SPACE = re.compile(r"[ \t\u00a0]+")
_UNDERLINE = re.compile(r"([=\-~*^#\"'`+])\1{2,}\s*")
_LIST_ITEM = re.compile(r"(?:[-*+\u2022]|\d{1,3}[.)])\s+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a reader found: the title (may be empty) and the text."""

    title: str
    text: str


def read_text(text: str) -> Content:
    """Plain text: hard-wrapped paragraphs are joined, underlined lines are headings, indented code is left out."""
    lines: list[str] = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        found = [line.rstrip() for line in block.split("\n") if line.strip()]
        lines.extend(_text_block(found) if found else ())
    return _content(lines)


def _text_block(block: list[str]) -> list[str]:
    if _is_code(block):
        return []
    joined: list[str] = []
    is_open = False
    for number, line in enumerate(block):
        if _UNDERLINE.fullmatch(line):
            # the line above an underline is a heading; a rule with nothing above it is dropped
            if joined and number and not joined[-1].startswith("#"):
                joined[-1] = "# " + joined[-1].strip()
            is_open = False
        elif line.startswith("#") or _LIST_ITEM.match(line.strip()) or not is_open:
            joined.append(line.strip())
            is_open = not line.startswith("#")
        else:
            joined[-1] = _join(joined[-1], line.strip())
    return joined


def _is_code(block: list[str]) -> bool:
    """True for a block indented throughout in which no line ends as prose does."""
    if not all(line.startswith((" ", "\t")) for line in block):
        return False
    return not block[-1].endswith((".", "!", "?", ":", ";", "。", "！", "？")) or any(
        line.strip().startswith((">>>", "$ ")) for line in block
    )


def _join(left: str, right: str) -> str:
    # Chinese is wrapped without a space
    return left + right if left[-1:] > "\u2e7f" and right[:1] > "\u2e7f" else f"{left} {right}"


def read_markdown(text: str) -> Content:
    """Markdown by markdown-it-py; fenced and indented code, tables and raw HTML blocks are left out."""
    module = require("markdown_it", extra="readers")
    parser = module.MarkdownIt("commonmark").enable("table")
    lines: list[str] = []
    heading: int | None = None
    in_table = False
    body = re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), count=1, flags=re.DOTALL)
    for token in parser.parse(body):
        if token.type in ("table_open", "table_close"):
            in_table = token.type == "table_open"
        elif token.type == "heading_open":
            heading = int(token.tag[1])
        elif token.type == "inline" and not in_table:
            words = _markdown_inline(token.children or [])
            lines.append(f"{'#' * heading} {words}" if heading else words)
        elif token.type == "heading_close":
            heading = None
    return _content(lines)


def _markdown_inline(tokens: list[Any]) -> str:
    words = {"text", "code_inline"}
    breaks = {"softbreak", "hardbreak"}
    return "".join(str(t.content) if t.type in words else " " for t in tokens if t.type in words | breaks)


def read_rst(text: str) -> Content:
    """ReStructuredText by docutils, directives it does not know are passed over; file inclusion is off."""
    core = require("docutils.core", extra="readers")
    nodes = require("docutils.nodes", extra="readers")
    # a system message of any level is neither printed nor fatal; nothing outside the file is read
    settings = {"report_level": 5, "halt_level": 6, "file_insertion_enabled": False, "raw_enabled": False}
    tree = core.publish_doctree(text, settings_overrides={**settings, "warning_stream": False})
    lines: list[str] = []
    skipped = (
        nodes.literal_block,
        nodes.table,
        nodes.system_message,
        nodes.comment,
        nodes.docinfo,
        nodes.doctest_block,
    )
    _walk_rst(tree, nodes, skipped, 0, lines)
    return _content(lines)


def _walk_rst(node: Any, nodes: Any, skipped: tuple[type, ...], depth: int, lines: list[str]) -> None:
    for child in node.children:
        if isinstance(child, skipped):
            continue
        if isinstance(child, nodes.title):
            lines.append("#" * max(1, min(6, depth)) + " " + child.astext().replace("\n", " "))
        elif isinstance(child, nodes.paragraph | nodes.term):
            lines.append(child.astext().replace("\n", " "))
        else:
            _walk_rst(child, nodes, skipped, depth + isinstance(child, nodes.section), lines)


_HTML_BLOCKS = ["h1", "h2", "h3", "h4", "h5", "h6", "p", "li", "dd", "dt", "blockquote", "div", "article", "section"]
_HTML_DROPPED = ["script", "style", "pre", "table", "nav", "header", "footer", "aside", "form", "template", "noscript"]


def read_html(text: str) -> Content:
    """HTML by Beautiful Soup: headings and blocks of the body, without scripts, navigation, code and tables."""
    soup = require("bs4", extra="readers").BeautifulSoup(text, "html.parser")
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    for node in soup(_HTML_DROPPED):
        node.decompose()
    if soup.head:
        soup.head.decompose()
    for block in soup(_HTML_BLOCKS):
        # a mark before each block keeps nested ones apart when the whole text is taken
        mark = f"\x1e{'#' * int(block.name[1])} " if re.fullmatch(r"h[1-6]", block.name) else "\x1e"
        block.insert(0, mark)
        block.append("\x1e")
    lines = [" ".join(part.split()) for part in soup.get_text().split("\x1e")]
    return _content([line for line in lines if line.strip("# ")], title=title)


def read_pdf(data: bytes, *, where: str) -> Content:
    """PDF by pypdf; lines of a page are joined to paragraphs as plain text's are."""
    pypdf = require("pypdf", extra="readers")
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        text = "\n\n".join(page.extract_text() for page in reader.pages)
        title = str((reader.metadata.title if reader.metadata else "") or "")
    except Exception as error:  # pypdf raises many kinds on damaged files
        raise InputError(f"{where}: not a readable PDF ({error}). Save it again or convert it to text.") from error
    # a word cut at the end of a line is put together again
    content = read_text(re.sub(r"(\w)-\n(\w)", r"\1\2", text))
    return Content(title=title or content.title, text=content.text)


def _content(lines: list[str], title: str = "") -> Content:
    cleaned = [_SPACE.sub(" ", _CONTROL.sub("", line)).strip() for line in lines]
    cleaned = [line for line in cleaned if line.strip("# ")]
    if not title:
        title = next((line.lstrip("# ") for line in cleaned[:3] if line.startswith("#")), "")
    return Content(title=title, text="\n".join(cleaned))


# by suffix; `.pdf` is read from bytes by read_pdf
READERS: dict[str, Callable[[str], Content]] = {
    ".txt": read_text,
    ".text": read_text,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".rst": read_rst,
    ".html": read_html,
    ".htm": read_html,
}
