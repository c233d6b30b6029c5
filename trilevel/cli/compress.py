"""`trilevel compress`: a smaller, cheaper model by the plan of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_SHOWN_LAYERS = 10


def compress(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder of `trilevel train` or `convert`, or the name of a pretrained text encoder.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write: the compressed run, report.json, stages/.")],
    plan: Annotated[Path, typer.Option(help="TOML file such as recipes/compress-images.toml.")],
    data: Annotated[
        Path | None, typer.Option(help="Data of the kind the model was trained on; default: that, or built-in text.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Run that teaches; default: the uncompressed model. Needs [distill] in the plan.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Write no result that lost more quality (see the table), e.g. 0.01.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each split, for a try.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of training and the order of its examples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report alone, as the last line.")] = False,
) -> None:
    """Prune, distil and quantize a trained model; each stage is measured and kept.

    Stopped, the same command goes on. The result is a run as the checkpoint is: `trilevel evaluate` and `predict` take
    it. With --max-loss exceeded the exit code is 2 and the stages stay.
    """
    import json

    from trilevel.applications.compress import load_task
    from trilevel.cli.bench import progress_bar
    from trilevel.compression.compress import compress as run
    from trilevel.compression.plan import read_plan

    chosen = read_plan(plan)
    with progress_bar() as progress:
        task = load_task(checkpoint, data=data, limit=limit, options=chosen.data, seed=seed, progress=progress)
        made = run(task, chosen, out, teacher=teacher, max_loss=max_loss, seed=seed, progress=progress)
    if as_json:
        typer.echo(json.dumps(made.report))
        return
    _print(made.report)
    typer.echo(f"written to {out}: the run ({task.kind}), report.json, stages/")


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120)
    for stage in report["stages"]:
        if rows := stage["details"].get("scan"):
            console.print(_scan_table(rows, stage["details"]["skip"], report["metric"]))
    table = Table(title=f"{report['kind']}: {report['source']['metrics']['examples']:,} held-out examples")
    for heading in ("stage", "parameters", "bytes", "ms, batch 1", "source, ms", report["metric"], "untrained"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for row in [report["source"], *report["stages"]]:
        untrained = row.get("quality_untrained")
        table.add_row(
            row["stage"],
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
            f"{row['latency_ms']:.2f}",
            f"{row['source_latency_ms']:.2f}",
            f"{row['quality']:.4f}",
            "" if untrained is None else f"{untrained:.4f}",
        )
    console.print(table)
    console.print(
        f"1 / {1 / report['size_ratio']:.1f} of the bytes, {report['speedup']:.2f} times the speed in torch, "
        f"{report['metric']} {round(-report['loss'], 4) + 0.0:+.4f}",
        highlight=False,
    )


def _scan_table(rows: list[dict[str, Any]], skipped: list[str], metric: str) -> Any:
    from rich.table import Table

    table = Table(title=f"each layer alone quantized; the {min(len(rows), _SHOWN_LAYERS)} most harmful")
    for heading in ("layer", f"{metric} lost", "bytes saved", ""):
        table.add_column(heading, justify="right" if heading.endswith(("lost", "saved")) else "left")
    for row in rows[:_SHOWN_LAYERS]:
        left = "stays float" if row["name"] in skipped else ""
        table.add_row(row["name"], f"{row['loss']:+.4f}", f"{row['bytes_saved']:,}", left)
    return table
