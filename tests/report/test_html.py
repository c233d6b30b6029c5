"""The report: what it shows, that hostile text stays text, and that the page loads nothing."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from trilevel.errors import InputError
from trilevel.report.content import Contender, GlobalToken, LevelMap, Piece, ReportContent, UnitView
from trilevel.report.html import render, write_report

HOSTILE = '<script>alert(1)</script><img src="http://x.example/y" onerror=\'z\'>"{{ 7 * 7 }}& $\\frac$'


def content(text: str = "A chosen sentence.") -> ReportContent:
    marked = (
        Piece(
            text=text,
            reason=GlobalToken(text=text, position=3, layers=(1, 2), score=0.5, prior=2.0, is_forced=False).reason,
        ),
        Piece(text=" And more."),
    )
    return ReportContent(
        title=text,
        source=text,
        abstract=text,
        rouge={"ROUGE-1": 41.5},
        units=(
            UnitView(pieces=(Piece(text="Plain heading"),), kind="heading", level=1),
            UnitView(pieces=marked, kind="sentence", is_chosen=True),
            UnitView(pieces=(Piece(text="Same paragraph."),), kind="sentence", opens_paragraph=False),
            UnitView(pieces=(Piece(text="Next paragraph."),), kind="sentence"),
            UnitView(pieces=(Piece(text="- An item."),), kind="item"),
        ),
        contenders=(
            Contender(name="trilevel", label=text, tokens=1213, seconds=0.517, runs=5, peak_memory_bytes=7 * 2**20),
            Contender(name="sdpa", label="dense", tokens=1213, seconds=None, runs=0, peak_memory_bytes=None, note=text),
        ),
        facts=(("words", text),),
        notes=(text,),
        global_tokens=(GlobalToken(text=text, position=3, layers=(1,), score=0.5, prior=2.0, is_forced=True),),
        level_maps=(
            LevelMap(layer=text, head_class="local", num_heads=2, sees=text, mass=np.full((3, 5), 0.2)),
            LevelMap(layer=text, head_class="global", num_heads=1, sees=text, mass=np.eye(3, 5)),
        ),
        machine={"cpu": text, "isa": ["avx2", text], "memory_bytes": 3 * 2**30, "gpu": None, "versions": {"a": text}},
    )  # fmt: skip


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_shows_summary_document_table_plots_maps_and_machine() -> None:
    page = render(content())
    parsed = Page(page)
    assert '<mark id="u1">' in page
    assert 'href="#u1"' in page
    assert 'title="global in layers 1, 2: score +0.50, prior +2.00"' in page
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 4
    for shown in ("0.52 s", "7 MiB", "1,213", "3.0 GiB", "41.500", "Plain heading", "avx2"):
        assert shown in page, shown
    text = " ".join("".join(parsed.text).split())
    assert "A chosen sentence. And more. Same paragraph. Next paragraph." in text
    article = page[page.index("<article>") : page.index("</article>")]
    assert article.count("<p") == 3


@pytest.mark.parametrize("where", ["plain", "hostile"])
def test_text_of_any_origin_stays_text(where: str) -> None:
    page = render(content(HOSTILE if where == "hostile" else "plain"))
    parsed = Page(page)
    allowed = {"rel", "href", "class", "id", "title", "style"}
    assert not {tag for tag, _ in parsed.tags} & {"script", "iframe", "object", "embed", "link", "form", "base"}
    assert "{{ 7 * 7 }}" in page or where == "plain"
    for tag, attributes in parsed.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        if tag == "img":
            pytest.fail("an image tag came from the text")
        if tag == "a":
            assert set(attributes) <= allowed | {"aria-label"}
            assert str(attributes["href"]).startswith("#")


def test_the_page_loads_nothing() -> None:
    page = render(content())
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "xlink:href", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_ids_are_unique_and_links_lead_somewhere() -> None:
    parsed = Page(render(content()))
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    drawn = {name for name in ids if name and re.search(r"path|clip|image|^m[0-9a-f]{9,}|^p[0-9a-f]{9,}|_\d+$", name)}
    page_ids = [name for name in ids if name not in drawn]
    assert len(page_ids) == len(set(page_ids))
    targets = {str(a["href"])[1:] for tag, a in parsed.tags if tag == "a"}
    assert targets <= set(ids)


def test_the_same_content_gives_the_same_page() -> None:
    assert render(content()) == render(content())


def test_it_works_without_maps_and_with_nothing_measured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = render(replace(content(), level_maps=(), global_tokens=(), contenders=(), machine={}, abstract=""))
    assert 'id="levels"' not in page


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "report.html"
    write_report(path, content())
    assert path.read_text(encoding="utf-8") == render(content())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/report\.html cannot be written"):
        write_report(tmp_path / "file" / "report.html", content())
