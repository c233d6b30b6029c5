"""`trilevel verify`: whether an artifact is whole and every runtime gives its answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilevel.cli.exits import FAILED
from trilevel.cli.export import RuntimeName

if TYPE_CHECKING:
    from trilevel.applications.compare import Row


def verify(
    artifact: Annotated[Path, typer.Argument(help="Folder that `trilevel export` wrote.")],
    data: Annotated[
        Path | None, typer.Option(help="Inputs of your own, as `trilevel predict` takes them, compared as well.")
    ] = None,
    runtime: Annotated[
        list[RuntimeName] | None, typer.Option(help="Runtime to check; may be given again; default: all installed.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="That a call may use; default: one a core.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")] = False,
) -> None:
    """Compare hashes, then the answers of every installed runtime and precision; exit code 1 if anything differs."""
    import dataclasses
    import json

    from trilevel.applications.compare import compare
    from trilevel.artifact.manifest import read_artifact
    from trilevel.errors import ArtifactError

    try:
        found = read_artifact(artifact)
    except ArtifactError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from None
    rows = compare(
        found,
        runtimes=[name.value for name in runtime or []],
        data=data,
        threads=threads,
        tell=lambda what: typer.echo(f"{what} ...", err=True),
    )
    if as_json:
        values: list[dict[str, Any]] = [dataclasses.asdict(row) | {"holds": row.holds} for row in rows]
        typer.echo(json.dumps({"files": dict(found.hashes), "rows": values}))
    else:
        _print(rows, len(found.hashes))
    if not all(row.holds for row in rows):
        raise typer.Exit(FAILED)


def _print(rows: list[Row], num_files: int) -> None:
    from rich.console import Console
    from rich.table import Table

    # a table in a file needs no terminal's width
    console = Console(width=None if Console().is_terminal else 120)
    table = Table(title=f"{num_files} files are as they were written")
    for heading in ("runtime", "differs by", "cosine", "same answer", "same tokens", "integer kernels", "data by", ""):
        table.add_column(heading)
    for row in rows:
        own, found = row.checked, row.checked.parity
        shown = ("", "", "") if found is None else (
            f"{found.difference:.1e} of {found.tolerance:g}", f"{found.cosine:.4f}", f"{found.agreement:.3f}"
        )  # fmt: skip
        table.add_row(
            f"{own.runtime} {own.version}, {own.precision}{f', segments of {row.family}' if row.family else ''}",
            *shown,
            "" if row.overlap is None else f"{row.overlap:.4f}",
            "" if own.integer_kernels is None else str(own.integer_kernels),
            "" if row.data is None else f"{row.data.difference:.1e}",
            "holds" if row.holds else f"FAILS {own.error}".strip(),
        )
    console.print(table)
