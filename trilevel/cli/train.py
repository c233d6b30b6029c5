"""`trilevel train`: train a model of an application."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train a model: `documents`.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train a model; a run that was stopped goes on when the same command is given again."""


@app.command()
def documents(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log, tokenizer.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; default TRILEVEL_DATA.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file; default recipes/documents.toml.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The twin with dense attention, trained alike.")] = False,
    long: Annotated[bool, typer.Option("--long", help="The extra phase on whole documents; needs --start.")] = False,
    start: Annotated[Path | None, typer.Option(help="Run folder to go on from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of the recipe's.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each split, for a try.")] = None,
) -> None:
    """Train the document summariser on 2 cores in well under an hour."""
    import dataclasses

    from trilevel.applications.documents import recipe as recipes
    from trilevel.errors import ConfigError

    if long and start is None:
        raise ConfigError("--long goes on from a trained model; name its run folder with --start.")
    chosen = recipes.load_recipe(recipe, phase="long" if long else None)
    if steps is not None:
        chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, steps=steps))
    result = recipes.train(chosen, out_dir=out, data_root=data, is_dense=dense, start=start, limit=limit)
    typer.echo(
        f"{result.step} steps, loss {result.loss:.4f}, {result.seconds:.0f} s; checkpoint {result.checkpoint}, "
        f"log {result.log}"
    )
