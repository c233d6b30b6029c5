"""`trilevel demo`: a long document summarised, dense against multi-level attention, and a report to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from trilevel.applications.documents.demo import Demo


def demo(
    doc: Annotated[
        Path | None,
        typer.Option(help="Summarise this txt, md, rst, html or pdf file instead of the built-in document."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html.")] = Path("out/demo"),
    sentences: Annotated[int, typer.Option(min=1, help="Sentences in the summary.")] = 10,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a model that `trilevel train documents` wrote; default: the shipped one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the line of JSON alone.")] = False,
) -> None:
    """Summarise a document of 10,000 words and compare with dense attention.

    The built-in document is taken from the language reference that every Python carries. Each kind of attention runs in
    a process of its own, on the same weights; the last line of the output is JSON with the figures of the table.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from trilevel.applications.documents.builtin import builtin_document
    from trilevel.applications.documents.demo import run_demo
    from trilevel.data.documents import read_file

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        found = run_demo(
            builtin_document() if doc is None else read_file(doc),
            out_dir=out,
            num_sentences=sentences,
            model=model,
            tell=lambda text, share: progress.update(task, description=text, completed=share),
        )
    if not as_json:
        _print(found)
    typer.echo(json.dumps(found.figures, allow_nan=False))


def _print(found: Demo) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    figures = found.figures
    console.print(f"\n[bold]{escape(found.title)}[/bold]")
    console.print(f"{figures['words']:,} words, {figures['tokens']:,} tokens\n", style="dim")
    summary = Table.grid(padding=(0, 1))
    summary.add_column(justify="right", style="dim")
    for number, sentence in enumerate(found.sentences, start=1):
        summary.add_row(str(number), escape(sentence))
    console.print(summary)
    table = Table(title="\ndense against trilevel", title_justify="left")
    table.add_column("attention", no_wrap=True)
    for name in ("tokens", "seconds", "runs", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    for row in found.contenders:
        table.add_row(
            row.label,
            f"{row.tokens:,}",
            "–" if row.seconds is None else f"{row.seconds:.2f}",
            str(row.runs),
            "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:,.0f}",
            row.note,
            style="bold" if row.name == "trilevel" else None,
        )
    console.print(table)
    for line in ("Peak memory is that above the same process with everything loaded.", *found.notes):
        console.print(escape(line), style="dim")
    console.print(escape(_verdict(figures)))
    console.print(f"report: {escape(str(figures['report']))}\n", soft_wrap=True)


def _verdict(figures: dict[str, Any]) -> str:
    parts = []
    if figures["speedup"] is not None:
        least = "at least " if figures["speedup_is_lower_bound"] else ""
        parts.append(f"{least}{figures['speedup']:.1f}x faster than dense SDPA")
    if figures["memory_ratio"] is not None:
        parts.append(f"{figures['memory_ratio']:.1%} of the memory of materialised attention")
    if figures["agreement_with_dense"] is not None:
        parts.append(f"{figures['agreement_with_dense']:.0%} of the sentences of either summary are in both")
    return "trilevel: " + "; ".join(parts) if parts else ""
