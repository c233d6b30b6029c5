"""`trilevel bench CASE`: correctness first, then numbers, and whether the promised bars hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from trilevel.bench.harness import Progress, Report
    from trilevel.bench.listops import ListOpsCase

BAR_MISSED = 1

app = typer.Typer(
    no_args_is_help=True, help="Measure: correctness first, then speed; exit code 1 when a bar does not hold."
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of standard output.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny sizes and the correctness gate alone, no bars.")]
Out = Annotated[Path | None, typer.Option(help="Also write the document here, e.g. benchmarks/results/CASE.json.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: what torch takes.")]
Converted = Annotated[
    Path | None, typer.Option(help="A converted MiniLM; default: one whose heads are not profiled, as fast.")
]


@app.command()
def attention(
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    threads: Threads = None,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory at 8,192 tokens, in processes.")] = False,
) -> None:
    """Our attention beside dense attention and the sparse peers, fp32 and bf16, 512 to 32,768 tokens (about 5 min)."""
    import dataclasses

    import torch

    from trilevel.bench.attention import AttentionCase, run
    from trilevel.bench.show import attention_tables

    if threads is not None:
        torch.set_num_threads(threads)
    case = AttentionCase.smoke() if smoke else dataclasses.replace(AttentionCase(), memory=memory)
    with progress_bar() as progress:
        report = run(case, progress)
    _finish(report, attention_tables(report), as_json=as_json, out=out)


@app.command()
def calibrate(as_json: Json = False, smoke: Smoke = False, out: Out = None, threads: Threads = None) -> None:
    """Fit the cost model to this machine and keep it for impl="auto" and predictions; wants a quiet machine (4 min)."""
    import torch

    from trilevel.bench.calibrate import CalibrateCase, run
    from trilevel.bench.show import calibrate_table

    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bar() as progress:
        report = run(CalibrateCase.smoke() if smoke else CalibrateCase(), progress)
    _finish(report, [calibrate_table(report)], as_json=as_json, out=out)


@app.command()
def encoders(
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    threads: Threads = None,
    encoder: Converted = None,
) -> None:
    """A document of 8,192 tokens to its vector: dense, converted, other sparse encoders; memory too (about 8 min)."""
    import torch

    from trilevel.bench.encoders import EncodersCase, encoders_table, run

    if threads is not None:
        torch.set_num_threads(threads)
    folder = None if encoder is None else str(encoder)
    with progress_bar() as progress:
        report = run(EncodersCase.smoke(folder) if smoke else EncodersCase(folder=folder), progress)
    _finish(report, [encoders_table(report)], as_json=as_json, out=out)


@app.command()
def compression(
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    threads: Threads = None,
    encoder: Converted = None,
    work: Annotated[
        Path | None, typer.Option(help="Keep the graphs here for the next run; else they are made anew (5 min).")
    ] = None,
    applications: Annotated[
        bool | None,
        typer.Option(help="The applications' artifacts alone (8 min), or the encoders alone; default: both."),
    ] = None,
) -> None:
    """INT8 encoders, ours and others', at 512 and 8,192 tokens, and the applications' artifacts (about 25 min)."""
    import dataclasses

    import torch

    from trilevel.bench.compression import CompressionCase, compression_table, run
    from trilevel.bench.compression_applications import applications_table

    if threads is not None:
        torch.set_num_threads(threads)
    case = CompressionCase.smoke() if smoke else CompressionCase()
    if applications:
        case = dataclasses.replace(case, lengths=(), memory=False, batch=0)
    if applications is False:
        case = dataclasses.replace(case, models=None)
    case = dataclasses.replace(case, folder=None if encoder is None else str(encoder), work=work)
    with progress_bar() as progress:
        report = run(case, progress)
    tables = [applications_table(report.rows)] if applications else [compression_table(report)]
    if found := report.settings.get("applications"):
        tables.append(applications_table(found))
    _finish(report, tables, as_json=as_json, out=out)


@app.command()
def paths(
    task: Annotated[
        list[str], typer.Option(help="ARTIFACT=DATA, an artifact of `trilevel route` and its data; may be given again.")
    ],
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    threads: Threads = None,
    runtime: Annotated[str, typer.Option(help="That the artifacts were certified on.")] = "onnxruntime",
    limit: Annotated[int | None, typer.Option(min=1, help="Test samples of each task; default: all.")] = None,
) -> None:
    """Routed artifacts beside the full path and the best fixed one, and how often certificates hold (10 min a task)."""
    import dataclasses

    import torch

    from trilevel.bench.paths import PathsCase, parse_tasks, paths_table, run

    if threads is not None:
        torch.set_num_threads(threads)
    case = PathsCase(tasks=parse_tasks(task), runtime=runtime, limit=limit)  # type: ignore[arg-type]  # checked later
    if smoke:
        case = dataclasses.replace(
            case, samples=16, draws=50, budget_s=1.0, batches=(1, 8), long_documents=0, has_bars=False
        )
    with progress_bar() as progress:
        report = run(case, progress)
    _finish(report, [paths_table(report)], as_json=as_json, out=out)


@app.command()
def retrieval(
    encoder: Annotated[Path, typer.Option(help="The converted MiniLM, a folder of `trilevel convert`.")],
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    threads: Threads = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data sets; default TRILEVEL_DATA.")] = None,
) -> None:
    """What a converted MiniLM finds beside the dense one, in long and short texts (about 20 min, resumable)."""
    import torch

    from trilevel.bench.retrieval import RetrievalCase, retrieval_tables, run

    if threads is not None:
        torch.set_num_threads(threads)
    folder = str(encoder)
    with progress_bar() as progress:
        report = run(RetrievalCase.smoke(folder, data) if smoke else RetrievalCase(folder=folder, data=data), progress)
    _finish(report, retrieval_tables(report), as_json=as_json, out=out)


@app.command()
def serving(
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    threads: Annotated[int, typer.Option(min=1, help="Workers of each server, a thread each.")] = 2,
    task: Annotated[
        list[str] | None, typer.Option(help="ARTIFACT=DATA, as of `bench paths`; default: the summariser that ships.")
    ] = None,
    part: Annotated[list[str] | None, typer.Option(help="cost, goodput or faults; default: all.")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Install other servers in the cache, each by itself.")] = False,
    soak_minutes: Annotated[float, typer.Option(min=0.0, help="At 70% of what can be answered.")] = 0.0,
) -> None:
    """The server beside LitServe, KServe and Triton, answers in time under load, and what faults lose (20 min)."""
    import dataclasses

    from trilevel.bench.serving.case import ServingCase, parse_task, run, serving_table

    case = ServingCase.smoke() if smoke else ServingCase(instances=threads)
    given: dict[str, Any] = {"installs": peers, "soak_minutes": soak_minutes}
    given |= {"tasks": tuple(map(parse_task, task))} if task else {}
    given |= {"parts": tuple(part)} if part else {}
    with progress_bar() as progress:
        report = run(dataclasses.replace(case, **given), progress)
    _finish(report, [serving_table(report)], as_json=as_json, out=out)


@app.command()
def gpu(as_json: Json = False, smoke: Smoke = False, out: Out = None) -> None:
    """Our Triton kernels at 16,384 tokens beside FlexAttention and FlashAttention. Needs an NVIDIA GPU (a minute)."""
    import os

    import torch

    if smoke and not torch.cuda.is_available():
        # read when triton is imported, which parts of torch may do
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from trilevel.bench.gpu import GpuCase, run
    from trilevel.bench.show import gpu_table

    with progress_bar() as progress:
        report = run(GpuCase.smoke() if smoke else GpuCase(), progress)
    _finish(report, [gpu_table(report)], as_json=as_json, out=out)


@app.command()
def levels(
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one for each thread of torch.")
    ] = None,
    docs: Annotated[Path | None, typer.Option(help="Also write levels.md and img/levels.png into this folder.")] = None,
) -> None:
    """What each level is worth: six variants on two generated tasks, three seeds, resumable (about 10 min)."""
    import dataclasses

    from trilevel.bench.levels import LevelsCase, run
    from trilevel.bench.levels_docs import write_docs
    from trilevel.bench.show import levels_table

    case = LevelsCase.smoke() if smoke else LevelsCase()
    if workers is not None:
        case = dataclasses.replace(case, workers=workers)
    with progress_bar() as progress:
        report = run(case, progress)
    if docs is not None:
        write_docs(report, docs)
    _finish(report, [levels_table(report)], as_json=as_json, out=out)


@app.command()
def listops(
    as_json: Json = False,
    smoke: Smoke = False,
    out: Out = None,
    variant: Annotated[list[str] | None, typer.Option(help="Variant, may be repeated; default: all four.")] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Samples at once, a divisor of 32.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
) -> None:
    """Long Range Arena ListOps under each variant, resumable. Wants a GPU (minutes); on a CPU it takes days."""
    import tempfile

    from trilevel.bench.listops import has_gpu, run
    from trilevel.bench.show import listops_table

    if not smoke and not has_gpu():
        typer.echo("no GPU found: ListOps trains on the CPU, which takes days; Ctrl-C keeps a checkpoint.", err=True)
    with tempfile.TemporaryDirectory() as folder:
        report = run(_listops_case(smoke, Path(folder), variant, micro_batch, steps))
    _finish(report, [listops_table(report)], as_json=as_json, out=out)


def _listops_case(
    smoke: bool, folder: Path, variants: list[str] | None, micro_batch: int | None, steps: int | None
) -> ListOpsCase:
    import dataclasses

    from trilevel.bench.listops import ListOpsCase, variant_levels
    from trilevel.errors import ConfigError

    case = ListOpsCase.smoke(folder) if smoke else ListOpsCase()
    if unknown := set(variants or ()) - set(variant_levels()):
        raise ConfigError(
            f"--variant {', '.join(sorted(unknown))} is unknown; choose from {', '.join(variant_levels())}."
        )
    if micro_batch is not None and case.micro_batch % micro_batch:
        raise ConfigError(
            f"--micro-batch {micro_batch} does not divide the batch of {case.micro_batch}; use a divisor."
        )
    size = case.micro_batch if micro_batch is None else micro_batch
    return dataclasses.replace(
        case,
        variants=tuple(variants or case.variants),
        micro_batch=size,
        accumulate=case.micro_batch // size,
        steps=steps or case.steps,
    )


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error: what is being done, how far it is, how long it has taken."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        update: Callable[..., None] = bar.update
        yield lambda what, done: update(task, description=what, completed=done)


def _finish(report: Report, tables: list[Table], *, as_json: bool, out: Path | None) -> None:
    """Print tables and document, write it, leave with 1 when a bar does not hold or a part of ours is broken."""
    from rich.console import Console

    from trilevel.bench.harness import write_json
    from trilevel.bench.show import bars_table
    from trilevel.report.machine import machine_block

    document = report.to_dict(machine_block())
    console = Console(width=None if Console().is_terminal else 160)
    for table in [*tables, *([bars_table(report.bars)] if report.bars else [])]:
        console.print(table)
    for name in report.broken:
        typer.echo(f"error: {name} failed its correctness gate", err=True)
    if out is not None:
        write_json(out, document)
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
    if not report.holds:
        raise typer.Exit(BAR_MISSED)
