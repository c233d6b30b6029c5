"""The page of an artifact with paths: every way to run it, by time and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trilevel.errors import require
from trilevel.report import plots
from trilevel.report.html import environment, machine_rows, style


def route_page(report: Mapping[str, Any]) -> str:
    """One HTML page that loads nothing, of the report that `applications.route` makes.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed (extra `report`).
    """
    markup = require("markupsafe", extra="report").Markup
    page: str = (
        environment()
        .get_template("routing.html")
        .render(
            report=report,
            batches=list(report["rows"][0]["ms"]),
            style=style(),
            picture=markup(plots.time_and_loss(report["rows"])),
            machine=list(machine_rows(report["machine"])),
        )
    )
    return page
