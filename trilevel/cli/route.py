"""`trilevel route`, `certify` and `route-explain`: paths of their own for inputs, with a proof of what they lose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trilevel.cli.export import RuntimeName, Target

if TYPE_CHECKING:
    from trilevel.applications.route import Options, Routing
    from trilevel.applications.route_outcomes import Machine

_MaxLoss = Annotated[
    float, typer.Option(help="What may be lost: harm (full path right, answer wrong); of ROUGE-1 for summaries.")
]
_Confidence = Annotated[float, typer.Option(help="That the loss is no larger.")]
_Target = Annotated[
    list[str] | None,
    typer.Option(
        help="Promise this instead: harm:0.01, agreement:0.02, net:0.01, recall=CLASS:0.01, drop:0.02; may be repeated."
    ),
]
_Runtime = Annotated[RuntimeName | None, typer.Option(help="Default: openvino on x86, else onnxruntime.")]
_Threads = Annotated[int | None, typer.Option(min=1, help="That a call may use; default: one a core.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Samples of each split, for a try.")]
_Seed = Annotated[int, typer.Option(min=0, help="Of the split and of training.")]
_DropKnown = Annotated[
    bool, typer.Option(help="Leave out samples that the model was trained on; else they are refused.")
]
_Statics = Annotated[
    list[Path] | None,
    typer.Option(
        "--static",
        metavar="ARTIFACT",
        help="Another model for the task, INT8 or distilled, that the report shows beside; may be repeated.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the report alone, as the last line.")]


def route(
    source: Annotated[
        Path,
        typer.Argument(
            help="Run of a float classifier, or of a summariser on a pretrained encoder; or an artifact with paths."
        ),
    ],
    data: Annotated[Path, typer.Argument(help="Held-out data with labels, or the data of the run's own training.")],
    out: Annotated[Path, typer.Argument(help="Artifact to write; OUT.work keeps what was made on the way.")],
    plan: Annotated[
        Path | None, typer.Option(help="How the cheap paths are made, as recipes/paths-*.toml; default: thirds.")
    ] = None,
    max_loss: _MaxLoss = 0.01,
    confidence: _Confidence = 0.95,
    target: _Target = None,
    runtime: _Runtime = None,
    threads: _Threads = None,
    limit: _Limit = None,
    seed: _Seed = 0,
    drop_known: _DropKnown = False,
    static: _Statics = None,
    kind: Annotated[
        Target, typer.Option("--artifact-target", help="Of the graphs, as --target of trilevel export.")
    ] = Target.portable,
    as_json: _Json = False,
) -> None:
    """Give each input the cheapest path that is proved safe: exits behind segments, INT8, the full model where needed.

    Makes and trains the cheap paths, runs all of them over held-out data, measures times, and writes an artifact with
    a certificate and a report. Stopped, the same command goes on. Where routing does not pay it says so.
    """
    from trilevel.applications.route import route as run
    from trilevel.cli.bench import progress_bar
    from trilevel.compression.plan import read_plan

    options = replace(
        _options(source, max_loss, confidence, target, limit, seed, drop_known, static), target=kind.value
    )
    with progress_bar() as progress:
        made = run(
            source,
            data,
            out,
            options,
            plan=None if plan is None else read_plan(plan),
            machine=_machine(runtime, threads, source, kind),
            progress=progress,
            tell=lambda what: typer.echo(f"{what} ...", err=True),
        )
    _show(made, as_json)


def certify(
    artifact: Annotated[Path, typer.Argument(help="With paths, that `trilevel route` wrote; certified anew in place.")],
    data: Annotated[Path, typer.Argument(help="Held-out data with labels that the model was not trained on.")],
    max_loss: _MaxLoss = 0.01,
    confidence: _Confidence = 0.95,
    target: _Target = None,
    runtime: _Runtime = None,
    threads: _Threads = None,
    limit: _Limit = None,
    seed: _Seed = 0,
    static: _Statics = None,
    as_json: _Json = False,
) -> None:
    """Prove an artifact's paths on other data, another runtime or another machine."""
    from trilevel.applications.route import route as run
    from trilevel.cli.bench import progress_bar

    options = _options(artifact, max_loss, confidence, target, limit, seed, drop_known=False, static=static)
    with progress_bar() as progress:
        made = run(artifact, data, artifact, options, machine=_machine(runtime, threads, artifact), progress=progress)
    _show(made, as_json)


def route_explain(
    artifact: Annotated[Path, typer.Argument(help="With paths, that `trilevel route` wrote.")],
    inputs: Annotated[list[str], typer.Argument(metavar="FILE_OR_TEXT...", help="As `trilevel predict` takes them.")],
    runtime: _Runtime = None,
    threads: _Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Why each input takes its path: harm expected, margins, what would have changed it, time saved."""
    import dataclasses
    import json

    from trilevel.applications.artifacts import explained

    machine = _machine(runtime, threads, artifact)
    for name, label, found in explained(artifact, inputs, runtime=machine.runtime, threads=machine.threads):
        if as_json:
            typer.echo(json.dumps({"source": name, "label": label} | dataclasses.asdict(found)))
            continue
        typer.echo(f"{name}: {label}")
        for line in found.said():
            typer.echo(f"  {line}")


def _options(
    source: Path,
    max_loss: float,
    confidence: float,
    target: list[str] | None,
    limit: int | None,
    seed: int,
    drop_known: bool,
    static: list[Path] | None,
) -> Options:
    from trilevel.applications.route import Options, default_target
    from trilevel.routing.targets import parse_target

    targets = tuple(map(parse_target, target)) if target else (default_target(source, max_loss),)
    return Options(
        targets=targets,
        confidence=confidence,
        limit=limit,
        seed=seed,
        drop_known=drop_known,
        statics=tuple(static or ()),
    )


def _machine(
    runtime: RuntimeName | None, threads: int | None, source: Path, target: Target = Target.portable
) -> Machine:
    from trilevel.applications.route_outcomes import Machine
    from trilevel.artifact.check import default_runtime
    from trilevel.artifact.manifest import is_artifact, read_artifact

    if runtime is not None:
        return Machine(runtime=runtime.value, threads=threads)
    if target is Target.native:
        return Machine(runtime=RuntimeName.onnxruntime.value, threads=threads)
    return Machine(runtime=default_runtime(read_artifact(source) if is_artifact(source) else None), threads=threads)


def _show(made: Routing, as_json: bool) -> None:
    import json

    if as_json:
        typer.echo(json.dumps(made.report))
        return
    from rich.console import Console
    from rich.table import Table

    report: dict[str, Any] = made.report
    console = Console(width=None if Console().is_terminal else 120)
    batches = list(report["rows"][0]["ms"])
    table = Table(title=f"{report['name']}: {report['samples']['test']:,} samples that chose nothing")
    for heading in ("way", *(f"ms, batch {batch}" for batch in batches), "loss", "proved", "paths"):
        table.add_column(heading, justify="left" if heading in ("way", "paths", "proved") else "right")
    for row in report["rows"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items() if share >= 0.005)
        proved = "" if row["is_proved"] is None else "yes" if row["is_proved"] else "no"
        times = [f"{row['ms'][batch]:.2f}" for batch in batches]
        table.add_row(row["name"], *times, f"{row['loss']:.4f}", proved, shares)
    console.print(table)
    kind = "each input takes its own path" if report["kind"] == "dynamic" else f"{report['kind']} for all"
    console.print(f"chosen: {kind}; {report['promise']}", highlight=False)
    console.print(f"written to {made.artifact.path}: report.html shows it", highlight=False)
