"""`trilevel info ARTIFACT`: what an artifact says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from trilevel.artifact.manifest import Tensors

_SHOWN_CHARACTERS = 200


def show(folder: Path, *, as_json: bool) -> None:
    """Print the manifest and the sizes of the files, as one JSON document or as a table.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    from trilevel.artifact.manifest import read_artifact

    artifact = read_artifact(folder)
    sizes = {name: artifact.bytes_of(name) for name in artifact.hashes}
    if as_json:
        typer.echo(
            json.dumps({"manifest": artifact.manifest.to_dict(), "bytes": sizes, "sha256": dict(artifact.hashes)})
        )
        return
    manifest = artifact.manifest
    _print(
        {
            "task": manifest.task,
            "name": manifest.name,
            "written by": f"trilevel {manifest.trilevel}",
            "precision": manifest.precision + (f" ({manifest.target})" if manifest.target else ""),
            **{f"input {name}": _tensor(own) for name, own in manifest.inputs.items()},
            **{f"output {name}": _tensor(own) for name, own in manifest.outputs.items()},
            "levels": _short(manifest.levels) if manifest.levels else "none: dense attention",
            **{name: _short(value) for name, value in manifest.settings.items()},
            **{f"file {name}": f"{size:,} bytes" for name, size in sizes.items()},
        }
    )


def _tensor(own: Tensors) -> str:
    return f"{own.dtype} ({', '.join(map(str, own.axes))})"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _print(rows: dict[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=box.SIMPLE)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    Console().print(table)
