"""The report: one HTML file that holds everything it shows and loads nothing, safe for text of any origin."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from trilevel.errors import InputError, require
from trilevel.report import plots
from trilevel.report.content import ReportContent, UnitView

_TEMPLATES = Path(__file__).parent / "templates"


def render(content: ReportContent) -> str:
    """The page as text.

    Every value is escaped by jinja2; only our own style sheet and pictures go in as they are. The page forbids scripts
    and loading by its content security policy.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed (extra `report`).
    """
    markup = require("markupsafe", extra="report").Markup
    page: str = (
        environment()
        .get_template("report.html")
        .render(
            content=content,
            style=style(),
            blocks=list(_blocks(content.units)),
            layers=[(layer, list(maps)) for layer, maps in groupby(content.level_maps, key=lambda shown: shown.layer)],
            picture=lambda shown: markup(plots.level_map(shown)),
            bars={name: markup(plots.bars(content.contenders, name)) for name in ("seconds", "memory")},
            colours=plots.COLOURS,
            machine=list(machine_rows(content.machine)),
        )
    )
    return page


def environment() -> Any:
    """Of the templates; everything is escaped that is no markup of our own.

    Raises:
        MissingExtraError: jinja2 is not installed (extra `report`).
    """
    jinja2 = require("jinja2", extra="report")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"mib": _mib, "seconds": _seconds}
    return made


def style() -> Any:
    """The style sheet of all pages, as markup."""
    return require("markupsafe", extra="report").Markup((_TEMPLATES / "report.css").read_text(encoding="utf-8"))


def write_report(path: Path, content: ReportContent) -> None:
    """Write the page atomically (temporary file, fsync, rename).

    Raises:
        InputError: the folder cannot be written.
        MissingExtraError: see `render`.
    """
    page = render(content)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.strerror}). Give --out a folder you can write.") from error


def _blocks(units: tuple[UnitView, ...]) -> Iterator[tuple[str, int, list[tuple[int, UnitView]]]]:
    """Headings by themselves, sentences of one paragraph together: (kind, heading level, [(index, unit)])."""
    open_block: list[tuple[int, UnitView]] = []
    for index, unit in enumerate(units):
        is_text = unit.kind in ("sentence", "item")
        joins = is_text and open_block and not unit.opens_paragraph and open_block[-1][1].kind == unit.kind
        if open_block and not joins:
            yield _block(open_block)
            open_block = []
        open_block.append((index, unit))
    if open_block:
        yield _block(open_block)


def _block(members: list[tuple[int, UnitView]]) -> tuple[str, int, list[tuple[int, UnitView]]]:
    first = members[0][1]
    # the page itself uses h1 and h2
    return first.kind, min(6, 2 + max(1, first.level)), members


def machine_rows(machine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The machine block as names and texts."""
    for name, value in machine.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            shown = " ".join(str(item) for item in value)
        elif name.endswith("_bytes") and value is not None:
            name, shown = name.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB"
        else:
            shown = "none" if value is None else str(value)
        yield name.replace("_", " "), shown or "none"


def _mib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.0f} MiB"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
