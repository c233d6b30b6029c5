"""From a trained classifier to an artifact with certified paths: every stage is kept, and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.applications.artifacts import export
from trilevel.applications.compress import load_task
from trilevel.applications.kinds import model_kind
from trilevel.artifact.export.artifact import check_target, precision_of
from trilevel.artifact.export.segments import export_segments, segment_probes
from trilevel.artifact.manifest import (
    CERTIFICATE_FILE,
    LATENCY_FILE,
    MODEL_FILE,
    PATHS_FILE,
    ROUTER_FILE,
    Artifact,
    is_artifact,
    read_artifact,
    write_artifact,
)
from trilevel.artifact.platform import isa_class
from trilevel.artifact.probe import write_probes
from trilevel.artifact.routed import model_hash
from trilevel.artifact.runtime.predictor import Precision, Runtime
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.compression.compress import compress
from trilevel.compression.plan import CompressionPlan
from trilevel.compression.task import CompressionTask
from trilevel.compression.written import read_json, write_json
from trilevel.errors import ConfigError, InputError
from trilevel.report.machine import machine_block
from trilevel.routing.executor import run_path
from trilevel.routing.features import features_of
from trilevel.routing.latency import LatencyTable, measure
from trilevel.routing.outcomes import Outcomes, load_outcomes
from trilevel.routing.paths import Family
from trilevel.routing.paths import Path as ModelPath
from trilevel.routing.router import margin
from trilevel.routing.samples import Samples

FULL = "float32/1"
"""The whole graph, in one segment."""
BATCHES = (1, 8, 32)
_LENGTHS = 4
Tell = Callable[[str], None]
Progress = Callable[[str, float], None]


def make_family(
    source: str | Path,
    plan: CompressionPlan,
    work: Path,
    *,
    seed: int,
    limit: int | None,
    progress: Progress,
    show_progress: bool,
    tell: Tell,
) -> Artifact:
    """The artifact of a classifier, whole in float32, with the segments that a plan makes of it beside.

    Args:
        source: run of a classifier; it stays the reference.
        plan: with exits and rounding.
        work: folder of what is kept between calls.
        seed: of training.
        limit: training examples, for a try.
        progress, show_progress, tell: told of what is done.

    Raises:
        ConfigError: the plan has no exits or no rounding, or the run is no float classifier without exits.
        as `compress` and `export`.
    """
    kinds = [stage.name for stage in plan.stages]
    if not {"exits", "quantize"} <= set(kinds):
        raise ConfigError(
            f"the plan has the stages {', '.join(kinds)}; paths need [exits] and [quantize], as recipes/paths-*.toml "
            "have them."
        )
    task = load_task(source, limit=limit, options=plan.data, progress=progress)
    if precision_of(task.model) != "float32" or getattr(task.model.config, "exits", None) != ():
        raise ConfigError(f"{source} must be a float image or text classifier without exits: it is the reference.")
    made = compress(task, plan, work / "model", seed=seed, progress=progress, show_progress=show_progress)
    folder = work / "draft"
    key = {"source": task.source_sha256, "model": made.report["stages"][-1]["key"]}
    if read_json(work / "draft.json") == key and is_artifact(folder):
        return read_artifact(folder)
    whole = export(source, work / "whole", tell=tell)
    tell("writing the segments")
    artifact = _with_segments(whole, made.model, task, work)
    write_json(work / "draft.json", key)
    return artifact


def _with_segments(whole: Artifact, model: Any, task: CompressionTask, work: Path) -> Artifact:
    check_target(model, "portable")
    family = precision_of(model)
    calls, axes = _calls(task, whole, model)
    files = work / "segments"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    largest = max(calls, key=lambda call: min((min(len(given), 2), given.numel()) for given in call.values()))
    segments = export_segments(model.eval(), family, largest, axes, files)
    origin = task.run.origin  # type: ignore[attr-defined]  # of both classifiers
    settings = dict(whole.manifest.settings) | {"valid_fraction": origin.valid_fraction}
    if hasattr(origin, "columns"):
        settings |= {"label_column": origin.columns.label, "split_column": origin.columns.split}
    manifest = replace(whole.manifest, settings=settings, families={family: segments})
    wanted: dict[str, Callable[[Path], None]] = {
        name: partial(shutil.copyfile, whole.file(name)) for name in whole.hashes
    }
    wanted |= {name: partial(shutil.copyfile, files / name) for name in manifest.segment_files}
    probes = segment_probes(model, calls)
    wanted[PATHS_FILE] = lambda path: write_probes(probes, path)
    return write_artifact(work / "draft", manifest, wanted)


def _calls(task: CompressionTask, whole: Artifact, model: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Inputs to trace and probe with, and the axes of all that segments read and give."""
    from trilevel.applications.probes import image_calls, text_calls

    axes: dict[str, Any] = {name: tensor.axes for name, tensor in whole.manifest.inputs.items()}
    axes |= {name: tensor.axes for name, tensor in whole.manifest.outputs.items()}
    config = model.config
    if task.kind == "images":
        patches = config.patches
        axes["hidden"] = ("batch", patches.num_tokens, config.encoder.dim)
        return image_calls((patches.num_channels, *patches.image_size)), axes
    axes["hidden"] = ("batch", "tokens", config.encoder.dim)
    tokenizer = task.run.tokenizer  # type: ignore[attr-defined]
    return text_calls(tokenizer, max_tokens=config.max_tokens, padding_id=config.padding_id), axes


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What paths are run with: runtime, threads, precision of what is not quantized."""

    runtime: Runtime
    threads: int | None = None
    precision: Precision = "float32"

    def open(self, artifact: Artifact) -> dict[str, SegmentSteps]:
        """The steps of all families, the full path's last."""
        options: dict[str, Any] = {"threads": self.threads, "precision": self.precision}
        steps = {name: SegmentSteps(artifact, name, self.runtime, **options) for name in artifact.manifest.families}
        return steps | {ModelPath.parse(FULL).family.name: SegmentSteps(artifact, None, self.runtime, **options)}

    def key(self, artifact: Artifact, steps: Mapping[str, SegmentSteps]) -> dict[str, Any]:
        """What answers and times depend on."""
        version = next(iter(steps.values())).version
        return {
            "model": model_hash(artifact),
            "runtime": self.runtime,
            "version": version,
            "isa": isa_class(),
            "threads": self.threads,
            "precision": self.precision,
        }


def collect(
    artifact: Artifact,
    machine: Machine,
    samples: Samples,
    steps: Mapping[str, SegmentSteps],
    kept: Path,
    *,
    progress: Progress,
    what: str,
) -> Outcomes:
    """What every path answers for samples, from a file if it was found before."""
    key = machine.key(artifact, steps) | {"samples": samples.sha256}
    del key["threads"]
    if read_json(kept.with_suffix(".json")) == key and kept.exists():
        return load_outcomes(kept)
    names, features = features_of(samples.task)
    predictions, margins, paths = [], [], []
    total, done = len(samples) * len(steps), 0
    for family, own in steps.items():
        deepest = Family.parse(family).at(own.num_segments)

        def count(run: Any, name: str = family, last: int = own.num_segments - 1) -> None:
            nonlocal done
            done += run.batch if run.segment == last else 0
            progress(f"{what}: {name}", done / total)

        outputs = run_path(
            samples.rows, own, deepest, max_batch=32, length_of=samples.length_of, collate=samples.collate,
            on_batch=count,
        )  # fmt: skip
        predictions.append(outputs.argmax(-1))
        margins.append(margin(outputs))
        paths += [Family.parse(family).at(segment + 1).name for segment in range(own.num_segments)]
    found = Outcomes(
        paths=tuple(paths),
        full=FULL,
        predictions=np.concatenate(predictions, axis=1),
        margins=np.concatenate(margins, axis=1),
        features=np.concatenate([features(samples.collate([row], samples.length_of(row))) for row in samples.rows]),
        lengths=samples.lengths,
        groups=samples.groups,
        labels=samples.labels,
    )
    assert found.features.shape[1] == len(names)
    found.save(kept)
    write_json(kept.with_suffix(".json"), key)
    return found


def time_paths(
    artifact: Artifact,
    machine: Machine,
    samples: Samples,
    steps: Mapping[str, SegmentSteps],
    kept: Path,
    *,
    batches: Sequence[int] = BATCHES,
    budget_s: float = 60.0,
    progress: Progress,
) -> LatencyTable:
    """Milliseconds of every segment at usual batches and lengths, from a file if measured before on this machine."""
    key = machine.key(artifact, steps) | {"batches": list(batches), "samples": samples.sha256}
    before = read_json(kept)
    if before.get("key") == key:
        return LatencyTable.from_dict(before["table"])
    _, features = features_of(samples.task)
    lengths = np.unique(np.quantile(samples.lengths, np.linspace(0, 1, _LENGTHS), method="nearest")).tolist()
    table = measure(
        steps,
        samples.example,
        batches=batches,
        lengths=[int(length) for length in lengths],
        machine=machine_block(),
        router=features,
        budget_s=budget_s,
        progress=progress,
    )
    write_json(kept, {"key": key, "table": table.to_dict()})
    return table


def sample_ms(table: LatencyTable, outcomes: Outcomes, batch: int) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each path for each sample at a batch size, (samples,) by the path's name."""
    lengths = np.clip(outcomes.lengths, table.lengths[0], table.lengths[-1])
    return {path: table.ms(path, batch, lengths) / batch for path in outcomes.paths}


def load_samples(artifact: Artifact, data: str | Path, *, split: str | None, limit: int | None) -> Samples:
    """Samples of the artifact's task.

    Raises:
        InputError: the data cannot be used.
        ConfigError: the task is not routed.
    """
    from trilevel.applications.classification import routing as texts
    from trilevel.applications.images import routing as images

    loaders: dict[str, Callable[..., Samples]] = {"images": images.load_samples, "classification": texts.load_samples}
    features_of(artifact.manifest.task)
    return loaders[artifact.manifest.task](artifact, data, split=split, limit=limit)


__all__ = [
    "CERTIFICATE_FILE", "LATENCY_FILE", "MODEL_FILE", "ROUTER_FILE", "UTC", "InputError", "Machine", "collect",
    "datetime", "json", "load_samples", "make_family", "model_kind", "sample_ms", "time_paths",
]  # fmt: skip
