"""`trilevel train`: train a model of an application."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from trilevel.applications.classification.data import Data
    from trilevel.applications.images.model import ImageClassifier
    from trilevel.data.image_folder import ImageSet

app = typer.Typer(help="Train a model: `documents`, `classification`, `images`.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Train a model; a run that was stopped goes on when the same command is given again."""


@app.command()
def documents(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log, tokenizer.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; default TRILEVEL_DATA.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file; default in recipes/.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The twin with dense attention, trained alike.")] = False,
    encoder: Annotated[
        str | None, typer.Option(help="Train on a pretrained encoder: folder of `trilevel convert`, or a name.")
    ] = None,
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
    recipe = recipe or (None if encoder is None else recipes.MINILM_RECIPE)
    chosen = recipes.load_recipe(recipe, phase="long" if long else None)
    if steps is not None:
        chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, steps=steps))
    result = recipes.train(
        chosen, out_dir=out, data_root=data, encoder=encoder, is_dense=dense, start=start, limit=limit
    )
    typer.echo(
        f"{result.step} steps, loss {result.loss:.4f}, {result.seconds:.0f} s; checkpoint {result.checkpoint}, "
        f"log {result.log}"
    )


@app.command()
def classification(
    data: Annotated[Path, typer.Argument(help="CSV, TSV or JSONL, also .gz or .xz.")],
    text_column: Annotated[str, typer.Option(help="Column with the text.")],
    label_column: Annotated[str, typer.Option(help="Column with the class.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, tokenizer, log.")],
    encoder: Annotated[
        str | None, typer.Option(help="Folder of `trilevel convert`, or a pretrained encoder; default MiniLM.")
    ] = None,
    split_column: Annotated[str | None, typer.Option(help="Column that says train, valid or test.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file such as recipes/classification.toml.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the rows, instead of the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of passes.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a text that are read; default: what the encoder was trained for.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each split, for a try.")] = None,
) -> None:
    """Fine-tune a pretrained encoder, dense or converted, to classify your texts.

    Rows are split by their text, a tenth for validation, unless a column says how. Stopped, the same command goes on.
    """
    import dataclasses

    from trilevel.applications.classification import recipe as recipes
    from trilevel.applications.classification.data import Columns

    chosen = recipes.load_recipe(recipe)
    given = {"epochs": epochs, "steps": steps}
    schedule = dataclasses.replace(chosen.schedule, **{k: v for k, v in given.items() if v is not None})
    result = recipes.train(
        data,
        Columns(text=text_column, label=label_column, split=split_column),
        out_dir=out,
        encoder=encoder or recipes.DEFAULT_ENCODER,
        recipe=dataclasses.replace(chosen, schedule=schedule),
        max_tokens=max_tokens,
        limit=limit,
        on_start=_print_rows,
    )
    fit = result.fit
    typer.echo(
        f"{fit.step} steps, loss {fit.loss:.4f}, {fit.seconds:.0f} s; checkpoint {fit.checkpoint}, log {fit.log}\n"
        f"Next: trilevel evaluate classification {out}"
    )


@app.command()
def images(
    data: Annotated[
        Path, typer.Argument(help="Folder with a folder for each class, or .npz; also below TRILEVEL_DATA.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log.")],
    dense: Annotated[bool, typer.Option("--dense", help="Dense attention: the teacher, or the twin.")] = False,
    teacher: Annotated[
        Path | None, typer.Option(help="Run to learn from: its weights to start with, its answers and vectors.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file such as recipes/images-fashion.toml.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images, instead of the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, instead of passes.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Resize the images: 32, or 32x48 for height and width; needed if sizes differ.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Images of each split, for a try.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of weights, order and shifts, instead of the recipe's two.")
    ] = None,
) -> None:
    """Train a small classifier of 2x2 patches on your images.

    A tenth is held out by content, unless folders train, valid and test say how. Stopped, the same command goes on.
    """
    import dataclasses

    from trilevel.applications.images import recipe as recipes
    from trilevel.cli.reading import ReadingProgress

    chosen = recipes.load_recipe(recipe)
    given = {"epochs": epochs, "steps": steps}
    schedule = dataclasses.replace(chosen.schedule, **{k: v for k, v in given.items() if v is not None})
    chosen = dataclasses.replace(chosen, schedule=schedule)
    if seed is not None:
        own = {name: dataclasses.replace(getattr(chosen, name), seed=seed) for name in ("data", "train")}
        chosen = dataclasses.replace(chosen, **own)
    with ReadingProgress() as reading:

        def start(found: ImageSet, model: ImageClassifier) -> None:
            # two bars cannot be drawn at once
            reading.stop()
            _print_images(found, model)

        result = recipes.train(
            data,
            out_dir=out,
            recipe=chosen,
            is_dense=dense,
            teacher=teacher,
            size=None if size is None else recipes.parse_size(size),
            limit=limit,
            on_progress=reading,
            on_start=start,
        )
    fit = result.fit
    typer.echo(
        f"{fit.step} steps, loss {fit.loss:.4f}, {fit.seconds:.0f} s; checkpoint {fit.checkpoint}, log {fit.log}\n"
        f"Next: trilevel evaluate images {out}"
    )


def _print_images(found: ImageSet, model: ImageClassifier) -> None:
    splits = [split for split, rows in found.rows.items() if len(rows)]
    console = _print_counts("images", found.labels, splits, [found.counts(split) for split in splits])
    if found.num_shared:
        console.print(f"{found.num_shared:,} images held out are trained on as well, as the folders have it.")
    patches, parameters = model.config.patches, sum(parameter.numel() for parameter in model.parameters())
    sizes = f"{patches.image_size[0]} x {patches.image_size[1]} x {patches.num_channels}"
    console.print(f"{sizes} pixels, {patches.num_tokens:,} tokens, {parameters:,} parameters.")


def _print_rows(data: Data, num_cut: int) -> None:
    splits = [split for split, examples in data.examples.items() if examples]
    console = _print_counts("rows", data.labels, splits, [data.counts(split) for split in splits])
    if data.num_empty:
        console.print(f"{data.num_empty:,} rows have no text and are left out.")
    if data.num_shared:
        console.print(f"{data.num_shared:,} rows held out have a text that is trained on as well, as the file has it.")
    if num_cut:
        console.print(f"{num_cut:,} training texts are longer than the model reads and are cut (--max-tokens).")


def _print_counts(title: str, labels: Sequence[str], splits: list[str], counts: list[dict[str, int]]) -> Console:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    table.add_column("class")
    for split in splits:
        table.add_column(split, justify="right")
    for label in labels:
        table.add_row(Text(label), *(f"{count[label]:,}" for count in counts))
    console = Console(stderr=True)
    console.print(table)
    return console
