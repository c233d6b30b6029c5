"""`trilevel predict`: the classes of texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trilevel.applications.classification.predict import Prediction

_SHOWN_CHARACTERS = 60
_SHOWN_CLASSES = 3


def predict(
    run: Annotated[Path, typer.Argument(help="Folder that `trilevel train classification` wrote.")],
    inputs: Annotated[
        list[str], typer.Argument(metavar="FILE_OR_TEXT...", help="Texts; files of text; tables (CSV, TSV, JSONL).")
    ],
    text_column: Annotated[
        str | None, typer.Option(help="Column of a table with the text; default: the one of the training.")
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the class of each text and the softmax over the classes, which is not calibrated.

    A row without text has no class.
    """
    from trilevel.applications.classification.checkpoint import load_run
    from trilevel.applications.classification.predict import items
    from trilevel.applications.classification.predict import predict as predictions

    loaded = load_run(run)
    found = predictions(loaded, items(inputs, text_column=text_column or loaded.origin.columns.text))
    if json_lines:
        _print_json(found)
    else:
        _print_table(found)


def _print_json(found: Iterator[Prediction]) -> None:
    import json

    for given in found:
        record = {"source": given.item.where} if given.item.where else {"text": given.item.text}
        values = {"label": given.label, "probabilities": given.probabilities}
        typer.echo(json.dumps(record | values, ensure_ascii=False))


def _print_table(found: Iterator[Prediction]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("text", "class", "softmax"):
        table.add_column(heading)
    for given in found:
        shown = " ".join(given.item.text.split())
        start = shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"
        where = f"{given.item.where}: " if given.item.where else ""
        table.add_row(Text(where + start), Text(given.label or "(no text)"), Text(_best(given)))
    Console().print(table)


def _best(given: Prediction) -> str:
    chances = sorted((given.probabilities or {}).items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {chance:.3f}" for label, chance in chances[:_SHOWN_CLASSES])
