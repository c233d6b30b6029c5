"""The `trilevel` command: its options, its commands, and how an error leaves it."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import trilevel
from trilevel.cli import (
    bench,
    compress,
    convert,
    demo,
    evaluate,
    export,
    info,
    predict,
    route,
    serve,
    summarize,
    train,
    verify,
)
from trilevel.cli.exits import INTERRUPTED, USAGE_ERROR
from trilevel.errors import TrilevelError

COMMANDS = (
    *("demo", "summarize", "convert", "train", "compress", "export", "route", "certify", "route-explain", "verify"),
    *("evaluate", "predict", "serve", "serve-key", "bench", "info"),
)


class Commands(TyperGroup):
    """Lists the commands in our order; turns our own errors into a message and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands in the order a newcomer meets them, not by alphabet."""
        # typer itself would list plain commands before those with subcommands
        return sorted(self.commands, key=lambda name: COMMANDS.index(name) if name in COMMANDS else len(COMMANDS))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a `TrilevelError` ends with exit code 2, Ctrl-C with 130, neither with a traceback."""
        try:
            return super().invoke(ctx)
        except TrilevelError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(USAGE_ERROR) from None
        except KeyboardInterrupt as interrupt:
            # a command that saved its work says so in the exception
            typer.echo(str(interrupt) or "interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(given: bool) -> None:
    if given:
        typer.echo(f"trilevel {trilevel.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Long documents through local, regional and global attention, on a CPU.

    Start with `trilevel demo`; `trilevel COMMAND --help` explains a command.
    """


app.command("demo")(demo.demo)
app.command("summarize")(summarize.summarize)
app.command("convert")(convert.convert)
app.add_typer(train.app, name="train")
app.command("compress")(compress.compress)
app.command("export")(export.export)
app.command("route")(route.route)
app.command("certify")(route.certify)
app.command("route-explain")(route.route_explain)
app.command("verify")(verify.verify)
app.add_typer(evaluate.app, name="evaluate")
app.command("predict")(predict.predict)
app.command("serve")(serve.serve)
app.command("serve-key")(serve.serve_key)
app.add_typer(bench.app, name="bench")
app.command("info")(info.info)
