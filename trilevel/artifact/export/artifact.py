"""A module to an artifact: the graph, probes with torch's answers, what every runtime made of them, a card."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trilevel
from trilevel.artifact.check import Checked, check_runtimes, installed
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.manifest import (
    CARD_FILE,
    MODEL_FILE,
    NATIVE,
    PROBE_FILE,
    REPORT_FILE,
    TARGETS,
    TOKENIZER_FILE,
    Artifact,
    Manifest,
    check_free,
    write_artifact,
)
from trilevel.artifact.probe import Probe, write_probes
from trilevel.compression.layers import (
    FrozenEmbedding,
    FrozenEmbedding4bit,
    FrozenLinear,
    FrozenLinear4bit,
    FrozenLinear8bitOf4,
    Reads,
)
from trilevel.errors import ArtifactError, CheckpointError, ConfigError
from trilevel.model.folder import sha256_of

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A module and what an artifact says of it.

    Args:
        task: see `Manifest`.
        name: of the model, for people.
        module: takes the arrays of a call in their order and returns one tensor.
        calls: inputs by name, of several sizes; what the module makes of them are the probes. The graph is traced with
            the largest of two rows or more, whose other varying axes must be above 1 too.
        axes: see `export_onnx`.
        output: name of what the module returns.
        settings: what the task needs beside the graph, JSON types.
        levels: what the heads see, for people.
        tokenizer: as JSON; None for none.
        about: what the model card says of the model, Markdown.
    """

    task: str
    name: str
    module: nn.Module
    calls: Sequence[Mapping[str, Tensor]]
    axes: Mapping[str, Sequence[int | str]]
    output: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    levels: Any = None
    tokenizer: str | None = None
    about: str = ""


def export_artifact(graph: Graph, out: str | Path, *, target: str, tell: Tell) -> Artifact:
    """Write an artifact, after the installed runtimes were compared with torch.

    Args:
        graph: what is exported.
        out: folder; an artifact there is replaced when the new one is whole.
        target: `portable`, `cpu` or `native`, see `Manifest`; the first two mean nothing in float32.
        tell: told what is being done.

    Raises:
        ArtifactError: `out` is something else or cannot be written, or no installed runtime gives torch's answers.
        CheckpointError: a weight is no finite number.
        ConfigError: the module cannot be exported, or not for this target.
        MissingExtraError: what exports is not installed.
    """
    check_free(Path(out))
    check_finite(graph.module)
    precision = precision_of(graph.module)
    check_target(graph.module, target)
    tell(f"torch answers {len(graph.calls)} probes")
    probes = [_probe(graph, call) for call in graph.calls]
    try:
        with tempfile.TemporaryDirectory(prefix="trilevel-export-") as folder:
            tell("tracing and writing the graph, which takes a minute or so")
            draft = _draft(graph, Path(folder), probes, precision, target)
            checked = check_runtimes(draft, installed(draft), tell=tell)
            _require_answers(checked)
            tell(f"writing {out}")
            return write_artifact(out, draft.manifest, _files(graph, draft, checked))
    except OSError as error:
        raise ArtifactError(
            f"{out} could not be written ({error}); what was there before is unchanged. Free space, also for temporary "
            "files, or choose another folder, then run again."
        ) from error


def precision_of(module: nn.Module) -> str:
    """`int4`, `int8` or `float32`, by the weights that are computed with."""
    kinds = {type(part) for part in module.modules()}
    if FrozenLinear4bit in kinds:
        return "int4"
    return "int8" if kinds & {FrozenLinear, FrozenLinear8bitOf4, FrozenEmbedding, FrozenEmbedding4bit} else "float32"


def check_finite(module: nn.Module) -> None:
    """Raise `CheckpointError` if a weight is no finite number."""
    for name, weight in module.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{name} holds values that are no finite numbers; such a model is not exported. Train it again, with a "
                "lower learning rate if it was this one."
            )


def check_target(module: nn.Module, target: str) -> None:
    """Raise `ConfigError` if a module's activations are none of the target's."""
    if target not in TARGETS:
        raise ConfigError(f"target={target!r} is unknown; known are {', '.join(TARGETS)}.")
    points = [part.input_zero_point for part in module.modules() if isinstance(part, Reads)]
    if target == "portable" and any(point is not None and point.dtype == torch.uint8 for point in points):
        raise ConfigError(
            "the activations are quantized to unsigned integers, which not every runtime takes. Export with "
            "--target cpu, or compress with activations = 'int8'."
        )


def _probe(graph: Graph, call: Mapping[str, Tensor]) -> Probe:
    with torch.no_grad():
        found: Tensor = graph.module(*call.values())
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{graph.name} answers with values that are no finite numbers; it is not exported.")
    inputs = {name: tensor.numpy() for name, tensor in call.items()}
    return Probe(inputs=inputs, outputs={graph.output: found.numpy()})


def _draft(graph: Graph, folder: Path, probes: Sequence[Probe], precision: str, target: str) -> Artifact:
    """What runtimes can open already, in a folder that goes away."""
    example = example_of(graph.calls)
    is_native = target == NATIVE
    inputs, outputs = export_onnx(
        graph.module, example, graph.axes, folder / MODEL_FILE, output=graph.output, is_native=is_native
    )
    write_probes(probes, folder / PROBE_FILE)
    manifest = Manifest(
        task=graph.task,
        name=graph.name,
        trilevel=trilevel.__version__,
        precision=precision,
        target=None if precision == "float32" and not is_native else target,
        inputs=inputs,
        outputs=outputs,
        settings=graph.settings,
        levels=graph.levels,
    )
    hashes = {name: sha256_of(folder / name) for name in (MODEL_FILE, PROBE_FILE)}
    return Artifact(path=folder, manifest=manifest, hashes=hashes)


def example_of(calls: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """What to trace with: a graph traced on rows that fill no second block or region takes no longer ones."""
    return max(calls, key=lambda call: min((min(len(given), 2), given.numel()) for given in call.values()))


def _require_answers(checked: Sequence[Checked]) -> None:
    # one that is wrong may be right on another processor; the report says it
    if not any(one.holds for one in checked):
        said = "; ".join(f"{one.runtime}: {one.said}" for one in checked)
        raise ArtifactError(f"nothing was written, as no runtime gives torch's answers: {said}.")


def _files(graph: Graph, draft: Artifact, checked: Sequence[Checked]) -> dict[str, Callable[[Path], None]]:
    sizes = {name: draft.bytes_of(name) for name in draft.hashes}
    if graph.tokenizer is not None:
        sizes[TOKENIZER_FILE] = len(graph.tokenizer.encode())
    report = {"bytes": sizes, "parity": [dataclasses.asdict(one) | {"holds": one.holds} for one in checked]}
    texts = {REPORT_FILE: json.dumps(report, indent=1) + "\n", CARD_FILE: _card(graph, draft, checked)}
    if graph.tokenizer is not None:
        texts[TOKENIZER_FILE] = graph.tokenizer
    files: dict[str, Callable[[Path], None]] = {
        name: partial(shutil.copyfile, draft.file(name)) for name in sizes if name != TOKENIZER_FILE
    }
    return files | {name: partial(_write, text) for name, text in texts.items()}


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _card(graph: Graph, draft: Artifact, checked: Sequence[Checked]) -> str:
    manifest = draft.manifest
    rows = "\n".join(f"| {one.runtime} {one.version} | {one.said} |" for one in checked)
    precision = manifest.precision if manifest.target is None else f"{manifest.precision}, {manifest.target}"
    return (
        f"# {graph.name}\n\n{graph.about}\n\n"
        f"- task: {graph.task}\n- precision: {precision}\n- graph: {draft.bytes_of(MODEL_FILE):,} bytes\n"
        f"- written by trilevel {manifest.trilevel}\n\n"
        f"Compared with torch on {len(graph.calls)} probes:\n\n| runtime | difference |\n|---|---|\n{rows}\n\n"
        "    import trilevel\n    print(trilevel.load(FOLDER).predict(INPUTS))\n"
    )
