"""`trilevel predict`: the classes of texts or images, as the run has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trilevel.applications.classification.predict import Prediction
    from trilevel.applications.images.predict import Prediction as ImagePrediction

_SHOWN_CHARACTERS = 60
_SHOWN_CLASSES = 3


def predict(
    run: Annotated[Path, typer.Argument(help="Folder that `trilevel train classification` or `train images` wrote.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE_OR_TEXT...",
            help="Texts; files of text; tables (CSV, TSV, JSONL). Or images; folders of them.",
        ),
    ],
    text_column: Annotated[
        str | None, typer.Option(help="Column of a table with the text; default: the one of the training.")
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the class of each text or image and the softmax over the classes, which is not calibrated.

    What the run was trained on decides what is read. A row without text has no class.
    """
    from trilevel.applications.images.checkpoint import is_image_run
    from trilevel.errors import ConfigError

    if not is_image_run(run):
        answers = _of_texts(run, inputs, text_column)
    elif text_column is None:
        answers = _of_images(run, inputs)
    else:
        raise ConfigError(f"{run} classifies images, which have no column; leave --text-column out.")
    if json_lines:
        _print_json(answers)
    else:
        _print_table(answers)


class _Answer(NamedTuple):
    """What is printed: the input under its name for JSON and as a person reads it, the label, the softmax."""

    record: dict[str, str]
    shown: str
    label: str | None
    probabilities: dict[str, float] | None


def _of_texts(run: Path, inputs: list[str], text_column: str | None) -> Iterator[_Answer]:
    from trilevel.applications.classification.checkpoint import load_run
    from trilevel.applications.classification.predict import items
    from trilevel.applications.classification.predict import predict as predictions

    loaded = load_run(run)
    found = predictions(loaded, items(inputs, text_column=text_column or loaded.origin.columns.text))
    return map(_of_text, found)


def _of_text(given: Prediction) -> _Answer:
    record = {"source": given.item.where} if given.item.where else {"text": given.item.text}
    shown = " ".join(given.item.text.split())
    start = shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"
    where = f"{given.item.where}: " if given.item.where else ""
    return _Answer(record, where + start, given.label, given.probabilities)


def _of_images(run: Path, inputs: list[str]) -> Iterator[_Answer]:
    from trilevel.applications.images.checkpoint import load_run
    from trilevel.applications.images.predict import files
    from trilevel.applications.images.predict import predict as predictions

    return map(_of_image, predictions(load_run(run), files(inputs)))


def _of_image(given: ImagePrediction) -> _Answer:
    return _Answer({"source": str(given.path)}, str(given.path), given.label, given.probabilities)


def _print_json(answers: Iterator[_Answer]) -> None:
    import json

    for answer in answers:
        values = {"label": answer.label, "probabilities": answer.probabilities}
        typer.echo(json.dumps(answer.record | values, ensure_ascii=False))


def _print_table(answers: Iterator[_Answer]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("input", "class", "softmax"):
        table.add_column(heading)
    for answer in answers:
        table.add_row(Text(answer.shown), Text(answer.label or "(no text)"), Text(_best(answer)))
    Console().print(table)


def _best(answer: _Answer) -> str:
    chances = sorted((answer.probabilities or {}).items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {chance:.3f}" for label, chance in chances[:_SHOWN_CLASSES])
