"""`trilevel export`: a trained model as an artifact."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer


class Target(enum.StrEnum):
    """What the artifact shall run on."""

    portable = "portable"
    cpu = "cpu"
    native = "native"


class Backbone(enum.StrEnum):
    """What the summariser that ships reads text with."""

    scratch = "scratch"
    minilm = "minilm"


class RuntimeName(enum.StrEnum):
    """What computes."""

    onnxruntime = "onnxruntime"
    openvino = "openvino"
    torch = "torch"


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Folder of `trilevel train`, `convert`, `compress`; the name of a pretrained encoder; or `documents`, "
            "the summariser that ships."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; an artifact there is replaced when this one is whole.")],
    target: Annotated[
        Target,
        typer.Option(
            help="portable: every runtime; cpu: unsigned activations as well; native: attention by trilevel's kernels, "
            "in ONNX Runtime alone, faster on long inputs."
        ),
    ] = Target.portable,
    backbone: Annotated[
        Backbone | None,
        typer.Option(help="Of that summariser: scratch, or minilm, made of MiniLM on this machine, once."),
    ] = None,
    runtime_check: Annotated[
        list[RuntimeName] | None,
        typer.Option(help="Write nothing unless this runtime answers as torch does; may be given again."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report alone, as the last line.")] = False,
) -> None:
    """Write one sealed folder: graph, tokenizer, probes, model card, report.

    Every installed runtime is compared with torch, and one of them must agree. Takes a minute for a small encoder.
    """
    import json

    from trilevel.applications.artifacts import export as run
    from trilevel.artifact.manifest import REPORT_FILE

    made = run(
        checkpoint,
        out,
        target=target.value,
        backbone=None if backbone is None else backbone.value,
        runtimes=[name.value for name in runtime_check or []],
        tell=lambda what: typer.echo(f"{what} ...", err=True),
    )
    report = json.loads(made.file(REPORT_FILE).read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(report))
        return
    for row in report["parity"]:
        said = row["error"] or f"{row['parity']['difference']:.1e} from torch"
        state = "" if row["holds"] else ", NOT the answers of torch: do not use it here"
        typer.echo(f"{row['runtime']} {row['version']}: {said}{state}")
    size = sum(made.bytes_of(name) for name in made.hashes)
    typer.echo(f"written to {out}: {made.manifest.task}, {made.manifest.precision}, {size:,} bytes")
