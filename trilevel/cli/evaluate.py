"""`trilevel evaluate`: measure a model of an application against its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trilevel.applications.classification.checkpoint import Run
    from trilevel.applications.classification.evaluate import HeldOut
    from trilevel.applications.classification.evaluate import Outcome as Classified
    from trilevel.applications.documents.evaluate import Case, Chooser, Outcome
    from trilevel.applications.images.checkpoint import Run as ImageRun
    from trilevel.applications.images.evaluate import HeldOut as HeldOutImages

app = typer.Typer(help="Evaluate a model: `documents`, `classification`, `images`.", no_args_is_help=True)

SMOKE_DOCUMENTS = 4
_SHOWN_CONFUSIONS = 8


@app.callback()
def _group() -> None:
    """Evaluate a model against its dense twin and the usual baselines."""


@app.command()
def documents(
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; default TRILEVEL_DATA.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Run folder; default the one kept for the bars.")] = None,
    dense_checkpoint: Annotated[Path | None, typer.Option(help="Run folder of the dense twin.")] = None,
    minilm_checkpoint: Annotated[Path | None, typer.Option(help="Run folder of the model on MiniLM.")] = None,
    split: Annotated[str, typer.Option(help="test, valid or train.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Take that many documents only.")] = None,
    budget_words: Annotated[int | None, typer.Option(help="Words of a summary; default 59.")] = None,
    json_only: Annotated[bool, typer.Option("--json", help="Print the JSON document alone.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few documents, no bars.")] = False,
) -> None:
    """ROUGE on whole documents: our models, a dense twin, Lead, Random, LexRank, TextRank, centroid MiniLM, oracle.

    The last line of standard output is one JSON document; exit code 1 when a bar does not hold.
    """
    import json

    from trilevel.applications.documents import evaluate as evaluation
    from trilevel.applications.documents.recipe import data_path
    from trilevel.applications.documents.summary import DEFAULT_BUDGET_WORDS

    cases = evaluation.prepare(data_path(evaluation.TECH, data), split=split, limit=SMOKE_DOCUMENTS if smoke else limit)
    ways = evaluation.systems(
        evaluation.runs(checkpoint, dense_checkpoint, minilm_checkpoint),
        budget_words=budget_words or DEFAULT_BUDGET_WORDS,
    )
    outcomes = _with_progress(cases, ways)
    result = evaluation.report(outcomes, with_bars=not smoke)
    result["split"] = split
    if not json_only:
        _print_table(result)
    typer.echo(json.dumps(result))
    if not all(bar["holds"] for bar in result["bars"]):
        raise typer.Exit(1)


def _with_progress(cases: list[Case], ways: Mapping[str, Chooser]) -> dict[str, Outcome]:
    from rich.console import Console
    from rich.progress import Progress

    from trilevel.applications.documents.evaluate import evaluate

    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks = {name: progress.add_task(name, total=len(cases)) for name in ways}
        return evaluate(cases, ways, on_progress=lambda name, done: progress.update(tasks[name], completed=done))


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['documents']} documents, {result['split']} split (F1, 95% interval)")
    for heading in ("system", "ROUGE-1", "ROUGE-2", "ROUGE-L", "words"):
        table.add_column(heading)
    for row in result["rows"]:
        cells = [
            f"{row[m]:.2f} [{row[f'{m}_interval'][0]:.2f}, {row[f'{m}_interval'][1]:.2f}]"
            for m in ("rouge1", "rouge2", "rougeL")
        ]
        table.add_row(row["system"], *cells, f"{row['words']:.0f}")
    console = Console(width=120)
    console.print(table)
    for bar in result["bars"]:
        console.print(f"{bar['name']}: {bar['value']} {bar['op']} {bar['bar']} {'holds' if bar['holds'] else 'FAILS'}")


@app.command()
def classification(
    run: Annotated[Path, typer.Argument(help="Folder that `trilevel train classification` wrote.")],
    data: Annotated[
        Path | None, typer.Argument(help="Table with the same columns; default: what training held out.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Another run, measured on the same rows.")] = None,
    split: Annotated[str | None, typer.Option(help="test, valid or train, found as in training.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take that many rows only.")] = None,
    json_only: Annotated[bool, typer.Option("--json", help="Print the JSON document alone.")] = False,
) -> None:
    """Accuracy with its 95% interval, F1, each class, confusions; with --compare the difference to another run.

    The last line of standard output is one JSON document.
    """
    import json

    from trilevel.applications.classification import evaluate as evaluation
    from trilevel.applications.classification.checkpoint import load_run
    from trilevel.report.machine import machine_block

    ours = load_run(run)
    theirs = None if compare is None else load_run(compare)
    rows = evaluation.held_out(ours, data, split=split, limit=limit)
    if theirs is not None:
        evaluation.check_comparable(ours, theirs, rows)
    outcome = _classified(ours, rows)
    result: dict[str, Any] = {"case": "classification", "machine": machine_block()}
    result |= {"run": str(run), "step": ours.step, "steps": ours.steps, "encoder": ours.origin.encoder}
    result |= {"data": str(rows.path), "split": rows.split, "empty_rows": rows.num_empty}
    result |= {"max_tokens": ours.max_tokens} | evaluation.report(outcome)
    if theirs is not None:
        other = _classified(theirs, rows)
        result["compare"] = {"run": str(compare), "encoder": theirs.origin.encoder, "max_tokens": theirs.max_tokens}
        result["compare"] |= evaluation.report(other) | {"difference": evaluation.compare(outcome, other)}
    if not json_only:
        _print_classified(result, rows)
    typer.echo(json.dumps(result))


def _classified(run: Run, rows: HeldOut) -> Classified:
    from rich.console import Console
    from rich.progress import Progress

    from trilevel.applications.classification.evaluate import evaluate

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("classifying", total=len(rows.examples))
        return evaluate(run, rows.examples, on_progress=lambda done: progress.update(task, completed=done))


@app.command()
def images(
    run: Annotated[Path, typer.Argument(help="Folder that `trilevel train images` wrote.")],
    data: Annotated[
        Path | None, typer.Argument(help="Folder of the same classes, or .npz; default: what training held out.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="Another run, measured on the same images.")] = None,
    split: Annotated[str | None, typer.Option(help="test, valid or train, found as in training.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take that many images only.")] = None,
    json_only: Annotated[bool, typer.Option("--json", help="Print the JSON document alone.")] = False,
) -> None:
    """Accuracy with its 95% interval, F1, each class, confusions; with --compare the difference to another run.

    The last line of standard output is one JSON document.
    """
    import json

    from trilevel.applications.images import evaluate as evaluation
    from trilevel.applications.images.checkpoint import load_run
    from trilevel.cli.reading import ReadingProgress
    from trilevel.report.machine import machine_block

    ours = load_run(run)
    theirs = None if compare is None else load_run(compare)
    with ReadingProgress() as reading:
        found = evaluation.held_out(ours, data, split=split, limit=limit, on_progress=reading)
    if theirs is not None:
        evaluation.check_comparable(ours, theirs, found)
    outcome = _classified_images(ours, found)
    result: dict[str, Any] = {"case": "images", "machine": machine_block()}
    result |= {"run": str(run), "step": ours.step, "steps": ours.steps} | evaluation.facts(ours)
    result |= {"data": str(found.path), "split": found.split} | evaluation.report(outcome)
    if theirs is not None:
        other = _classified_images(theirs, found)
        result["compare"] = {"run": str(compare), "step": theirs.step, "steps": theirs.steps}
        result["compare"] |= evaluation.facts(theirs) | evaluation.report(other)
        result["compare"] |= {"difference": evaluation.compare(outcome, other)}
    if not json_only:
        say = _say()
        say(f"{result['rows']:,} images of {result['data']} ({result['split']})")
        if found.num_shared:
            say(f"{found.num_shared:,} images held out are among those trained on as well.")
        _print_scores(result, "images")
    typer.echo(json.dumps(result))


def _classified_images(run: ImageRun, found: HeldOutImages) -> Classified:
    from rich.console import Console
    from rich.progress import Progress

    from trilevel.applications.images.evaluate import evaluate

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("classifying", total=len(found.classes))
        return evaluate(run, found, on_progress=lambda done: progress.update(task, completed=done))


def _print_classified(result: dict[str, Any], rows: HeldOut) -> None:
    say = _say()
    say(f"{result['rows']:,} rows of {result['data']} ({result['split']})")
    if rows.num_empty:
        say(f"{rows.num_empty:,} rows of the file have no text and are left out.")
    if rows.num_shared:
        say(f"{rows.num_shared:,} rows held out in the file have a text that was trained on as well.")
    _print_scores(result, "rows")


def _say() -> Callable[[str], None]:
    from rich.console import Console

    console = Console(width=120)
    return lambda text: console.print(text, markup=False, highlight=False)


def _print_scores(result: dict[str, Any], unit: str) -> None:
    say = _say()
    if result["step"] < result["steps"]:
        say(f"Training was stopped after step {result['step']} of {result['steps']}.")
    low, high = result["accuracy_interval"]
    say(
        f"accuracy {result['accuracy']:.4f} [{low:.4f}, {high:.4f}], the most frequent class {result['majority']:.4f}; "
        f"macro F1 {result['macro_f1']:.4f}"
    )
    _print_classes(result, unit)
    if "compare" in result:
        other, found = result["compare"], result["compare"]["difference"]
        low, high = found["points_interval"]
        say(
            f"{other['run']}: accuracy {other['accuracy']:.4f}, macro F1 {other['macro_f1']:.4f}. Difference "
            f"{found['points']:+.2f} points [{low:+.2f}, {high:+.2f}]; only the first is right on "
            f"{found['only_ours_right']} {unit}, only the second on {found['only_theirs_right']}."
        )


def _print_classes(result: dict[str, Any], unit: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="classes")
    names = [entry["label"] for entry in result["classes"]]
    # a confusion column for each class, while they fit
    taken = names if len(names) <= _SHOWN_CONFUSIONS else []
    for heading in ("class", unit, "precision", "recall", "F1"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name in taken:
        table.add_column(Text(f"said {name}"), justify="right")
    for entry, row in zip(result["classes"], result["confusion"], strict=True):
        cells = [f"{entry[key]:.3f}" for key in ("precision", "recall", "f1")]
        table.add_row(Text(entry["label"]), f"{entry['rows']:,}", *cells, *(f"{n:,}" for n in row[: len(taken)]))
    Console(width=120).print(table)
