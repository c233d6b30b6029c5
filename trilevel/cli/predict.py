"""`trilevel predict`: the classes of texts or images, or the vectors of texts, by a run or an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from trilevel.cli.export import RuntimeName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trilevel.applications.classification.predictions import Item, Prediction
    from trilevel.applications.images.predictions import Prediction as ImagePrediction

_SHOWN_CHARACTERS = 60
_SHOWN_CLASSES, _SHOWN_NUMBERS = 3, 4
_TEXTS_AT_ONCE = 1_024


def predict(
    run: Annotated[
        Path, typer.Argument(help="Folder of `trilevel train classification`, `train images` or `trilevel export`.")
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE_OR_TEXT...",
            help="Texts; files of text; tables (CSV, TSV, JSONL). Or images; folders of them. `-`: JSON lines.",
        ),
    ],
    text_column: Annotated[
        str | None, typer.Option(help="Column of a table with the text; default: the one of the training.")
    ] = None,
    runtime: Annotated[
        RuntimeName | None, typer.Option(help="Of an artifact; default: openvino on x86, else onnxruntime.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of an artifact; default: one a core.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Print the class of each text or image and the softmax over the classes, which is not calibrated.

    What the model was trained on decides what is read. A row without text has no class. An encoder gives vectors.
    """
    from trilevel.artifact.manifest import is_artifact

    if is_artifact(run):
        answers = _of_artifact(run, inputs, text_column, runtime, threads)
    else:
        answers = _of_run(run, inputs, text_column, has_options=runtime is not None or threads is not None)
    if json_lines:
        _print_json(answers)
    else:
        _print_table(answers)


def _of_run(run: Path, inputs: list[str], text_column: str | None, *, has_options: bool) -> Iterator[_Answer]:
    from trilevel.applications.images.checkpoint import is_image_run
    from trilevel.errors import ConfigError

    if has_options:
        raise ConfigError(
            f"{run} is no artifact, and runs in torch; leave --runtime and --threads out, or make one with "
            f"`trilevel export {run} OUT`."
        )
    if not is_image_run(run):
        return _of_texts(run, inputs, text_column)
    _check_no_column(run, text_column)
    return _of_images(run, inputs)


def _of_artifact(
    folder: Path, inputs: list[str], text_column: str | None, runtime: RuntimeName | None, threads: int | None
) -> Iterator[_Answer]:
    from trilevel.applications.artifacts import load
    from trilevel.applications.classification.predictions import items
    from trilevel.applications.images.predictions import files

    model = load(folder, runtime=None if runtime is None else runtime.value, threads=threads)
    typer.echo(f"{model.runtime} {model.version}, {model.manifest.precision}", err=True)
    task: Any = model.task
    if model.manifest.task == "images":
        _check_no_column(folder, text_column)
        return map(_of_image, task.stream(files(inputs)))
    if model.manifest.task == "classification":
        return map(_of_text, task.stream(items(inputs, text_column=text_column or task.text_column)))
    if model.manifest.task == "embedding":
        return _of_vectors(task, items(inputs, text_column=text_column or "text"))
    return _of_documents(task, inputs)


def _check_no_column(run: Path, text_column: str | None) -> None:
    from trilevel.errors import ConfigError

    if text_column is not None:
        raise ConfigError(f"{run} classifies images, which have no column; leave --text-column out.")


class _Answer(NamedTuple):
    """What is printed: the input under its name for JSON and as a person reads it, and the values by name."""

    record: dict[str, str]
    shown: str
    values: dict[str, Any]


def _of_texts(run: Path, inputs: list[str], text_column: str | None) -> Iterator[_Answer]:
    from trilevel.applications.classification.checkpoint import load_run
    from trilevel.applications.classification.predict import predict as predictions
    from trilevel.applications.classification.predictions import items

    loaded = load_run(run)
    found = predictions(loaded, items(inputs, text_column=text_column or loaded.origin.columns.text))
    return map(_of_text, found)


def _of_text(given: Prediction) -> _Answer:
    return _answer(given.item, {"label": given.label, "probabilities": given.probabilities})


def _of_vectors(task: Any, wanted: Iterator[Item]) -> Iterator[_Answer]:
    from itertools import islice

    while some := list(islice(wanted, _TEXTS_AT_ONCE)):
        for item, vector in zip(some, task.predict([item.text for item in some]), strict=True):
            yield _answer(item, {"vector": vector.tolist()})


def _of_documents(task: Any, inputs: list[str]) -> Iterator[_Answer]:
    import sys

    from trilevel.applications.classification.predictions import is_there
    from trilevel.data.json_lines import STDIN, read_lines

    for given in inputs:
        if given == STDIN:
            for where, text in read_lines(sys.stdin):
                yield _Answer({"source": where}, where, {"summary": task.predict([text])[0].sentences})
        else:
            has_file = is_there(Path(given))
            (summary,) = task.predict([Path(given) if has_file else given])
            shown = given if has_file else _shortened(given)
            yield _Answer({"source" if has_file else "text": given}, shown, {"summary": summary.sentences})


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def _answer(item: Item, values: dict[str, Any]) -> _Answer:
    record = {"source": item.where} if item.where else {"text": item.text}
    return _Answer(record, (f"{item.where}: " if item.where else "") + _shortened(item.text), values)


def _of_images(run: Path, inputs: list[str]) -> Iterator[_Answer]:
    from trilevel.applications.images.checkpoint import load_run
    from trilevel.applications.images.predict import predict as predictions
    from trilevel.applications.images.predictions import files

    return map(_of_image, predictions(load_run(run), files(inputs)))


def _of_image(given: ImagePrediction) -> _Answer:
    values = {"label": given.label, "probabilities": given.probabilities}
    return _Answer({"source": str(given.path)}, str(given.path), values)


def _print_json(answers: Iterator[_Answer]) -> None:
    import json

    for answer in answers:
        typer.echo(json.dumps(answer.record | answer.values, ensure_ascii=False))


def _print_table(answers: Iterator[_Answer]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Any = None
    for answer in answers:
        cells = _cells(answer)
        if table is None:
            table = Table("input", *cells)
        table.add_row(*map(Text, (answer.shown, *cells.values())))
    if table is not None:
        Console().print(table)


def _cells(answer: _Answer) -> dict[str, str]:
    """What is shown of an answer, by the heading of the column."""
    if "vector" in answer.values:
        return {"vector": _start(answer)}
    if "summary" in answer.values:
        return {"summary": "\n".join(answer.values["summary"])}
    return {"class": answer.values["label"] or "(no text)", "softmax": _best(answer)}


def _best(answer: _Answer) -> str:
    chances = sorted((answer.values["probabilities"] or {}).items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {chance:.3f}" for label, chance in chances[:_SHOWN_CLASSES])


def _start(answer: _Answer) -> str:
    vector = answer.values["vector"]
    return f"{', '.join(f'{number:.3f}' for number in vector[:_SHOWN_NUMBERS])}, … ({len(vector)} numbers)"
