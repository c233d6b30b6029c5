"""`trilevel evaluate`: measure a model of an application against its baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trilevel.applications.documents.evaluate import Case, Chooser, Outcome

app = typer.Typer(help="Evaluate a model: `documents`.", no_args_is_help=True)

SMOKE_DOCUMENTS = 4


@app.callback()
def _group() -> None:
    """Evaluate a model against its dense twin and the usual baselines."""


@app.command()
def documents(
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; default TRILEVEL_DATA.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Run folder; default the one kept for the bars.")] = None,
    dense_checkpoint: Annotated[Path | None, typer.Option(help="Run folder of the dense twin.")] = None,
    split: Annotated[str, typer.Option(help="test, valid or train.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Take that many documents only.")] = None,
    budget_words: Annotated[int | None, typer.Option(help="Words of a summary; default 59.")] = None,
    json_only: Annotated[bool, typer.Option("--json", help="Print the JSON document alone.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few documents, no bars.")] = False,
) -> None:
    """ROUGE on whole documents: our model, its dense twin, the shipped model, Lead, Random, LexRank, TextRank, oracle.

    The last line of standard output is one JSON document; exit code 1 when a bar does not hold.
    """
    import json

    from trilevel.applications.documents import evaluate as evaluation
    from trilevel.applications.documents.recipe import data_path
    from trilevel.applications.documents.summarize import DEFAULT_BUDGET_WORDS

    cases = evaluation.prepare(data_path(evaluation.TECH, data), split=split, limit=SMOKE_DOCUMENTS if smoke else limit)
    ways = evaluation.systems(
        evaluation.runs(checkpoint, dense_checkpoint), budget_words=budget_words or DEFAULT_BUDGET_WORDS
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
