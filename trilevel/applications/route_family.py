"""The family of cheap paths: a copy of a classifier with exits in INT8, as segments beside the whole graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trilevel.applications.artifacts import export
from trilevel.applications.compress import load_task
from trilevel.applications.kinds import kind_of
from trilevel.artifact.export.artifact import check_target, example_of, precision_of
from trilevel.artifact.export.segments import Piece, classifier_segments, export_segments, segment_probes
from trilevel.artifact.manifest import PATHS_FILE, Artifact, is_artifact, read_artifact, write_artifact
from trilevel.artifact.platform import has_integer_products
from trilevel.artifact.probe import Probe, write_probes
from trilevel.compression.compress import compress
from trilevel.compression.distill import DistillConfig
from trilevel.compression.exits import ExitsConfig
from trilevel.compression.plan import CompressionPlan, Recovery, Stage
from trilevel.compression.quantize import QuantizeConfig
from trilevel.compression.task import CompressionTask
from trilevel.compression.written import read_json, write_json
from trilevel.errors import ConfigError

Tell = Callable[[str], None]
Progress = Callable[[str, float], None]


class Origin(Protocol):
    """What a run says of its data."""

    @property
    def path(self) -> str:
        """Where it lies."""
        ...

    @property
    def valid_fraction(self) -> float:
        """Of it that is held out where it does not say."""
        ...


def default_plan() -> CompressionPlan:
    """Exits after every third of the blocks, trained by the run for 300 steps; 100 of INT8 where that is faster."""
    exits = Stage(name="exits", config=ExitsConfig(), recovery=Recovery(steps=300))
    rounding = Stage(name="quantize", config=QuantizeConfig(), recovery=Recovery(steps=100))
    return CompressionPlan(
        stages=(exits, rounding) if has_integer_products() else (exits,), losses=DistillConfig(hidden_weight=0.5)
    )


def make_family(
    source: str | Path,
    data: str | Path | None,
    plan: CompressionPlan | None,
    work: Path,
    *,
    target: str = "portable",
    seed: int,
    limit: int | None,
    progress: Progress,
    show_progress: bool,
    tell: Tell,
) -> tuple[Artifact, Origin]:
    """The artifact of a run, whole in float32, with the segments that a plan makes of it beside; and where the run's
    data is.

    Args:
        source: run of a classifier, or of a summariser on a pretrained encoder; it stays the reference.
        data: of the training of a summariser, whose run does not know it.
        plan: with exits; None for `default_plan`, or that of documents. With rounding the run is the full path, without
            the copy that it makes.
        work: folder of what is kept between calls.
        target: see `export`.
        seed: of training.
        limit: training examples, for a try.
        progress, show_progress, tell: told of what is done.

    Raises:
        ConfigError: the plan has no exits, or the run is no float classifier without exits.
        as `compress` and `export`.
    """
    if kind_of(source) == "documents":
        return _documents(
            source, data, plan, work, target=target, seed=seed, limit=limit, progress=progress,
            show_progress=show_progress, tell=tell,
        )  # fmt: skip
    plan = default_plan() if plan is None else plan
    kinds = [stage.name for stage in plan.stages]
    if "exits" not in kinds:
        raise ConfigError(
            f"the plan has the stages {', '.join(kinds)}; paths need [exits], as recipes/paths-*.toml have it."
        )
    task = load_task(source, limit=limit, options=plan.data, seed=seed, progress=progress)
    if precision_of(task.model) != "float32" or getattr(task.model.config, "exits", None) != ():
        raise ConfigError(f"{source} must be a float image or text classifier without exits: it is the reference.")
    made = compress(task, plan, work / "model", seed=seed, progress=progress, show_progress=show_progress)
    folder = work / "draft"
    key = {"source": task.source_sha256, "model": made.report["stages"][-1]["key"], "target": target}
    origin: Origin = task.run.origin  # type: ignore[attr-defined]  # of both classifiers
    if read_json(work / "draft.json") == key and is_artifact(folder):
        return read_artifact(folder), origin
    # without rounding the copy is the full path itself, and its exits are ends on the way
    is_float = precision_of(made.model) == "float32"
    own = key["model"] if is_float else key["source"]
    whole = _whole(made.folder if is_float else source, work, own, target, tell)
    whole = replace(whole, manifest=replace(whole.manifest, name=Path(source).resolve().name))
    tell("writing the segments")
    artifact = _classifier_draft(whole, made.model, task, target, work)
    write_json(work / "draft.json", key)
    return artifact, origin


def _documents(
    source: str | Path,
    data: str | Path | None,
    plan: CompressionPlan | None,
    work: Path,
    *,
    target: str,
    tell: Tell,
    **options: Any,
) -> tuple[Artifact, Origin]:
    from trilevel.applications.documents.route_family import make_document_family

    made = make_document_family(source, data, plan, work, **options)
    key = {"key": made.key, "target": target}
    if read_json(work / "draft.json") == key and is_artifact(work / "draft"):
        return read_artifact(work / "draft"), made.origin
    whole = _whole(source, work, made.key.partition(" ")[0], target, tell)
    tell("writing the segments")
    artifact = _draft(whole, made.name, made.pieces, made.example, made.axes, made.probes, made.settings, work)
    write_json(work / "draft.json", key)
    return artifact, made.origin


def _whole(source: str | Path, work: Path, model: str, target: str, tell: Tell) -> Artifact:
    """The graph of a model in float, which takes minutes, made once."""
    folder, key = work / "whole", {"key": model, "target": target}
    if read_json(work / "whole.json") != key or not is_artifact(folder):
        export(source, folder, target=target, tell=tell)
        write_json(work / "whole.json", key)
    return read_artifact(folder)


def _classifier_draft(whole: Artifact, model: Any, task: CompressionTask, target: str, work: Path) -> Artifact:
    check_target(model, target)
    calls, axes = _calls(task, whole, model)
    origin = task.run.origin  # type: ignore[attr-defined]  # of both classifiers
    settings = {"valid_fraction": origin.valid_fraction}
    if hasattr(origin, "columns"):
        settings |= {"label_column": origin.columns.label, "split_column": origin.columns.split}
    pieces = classifier_segments(model.eval(), list(calls[0]))
    probes = segment_probes(model, calls)
    return _draft(whole, precision_of(model), pieces, example_of(calls), axes, probes, settings, work)


def _draft(
    whole: Artifact,
    family: str,
    pieces: Sequence[Piece],
    example: Mapping[str, Tensor],
    axes: Mapping[str, Sequence[int | str]],
    probes: Sequence[Probe],
    settings: Mapping[str, Any],
    work: Path,
) -> Artifact:
    """The artifact of the whole graph with the segments of a family beside it."""
    files = work / "segments"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    segments = export_segments(pieces, family, example, axes, files, is_native=whole.manifest.is_native)
    settings = {**whole.manifest.settings, **settings}
    manifest = replace(whole.manifest, settings=settings, families={family: segments})
    wanted: dict[str, Callable[[Path], None]] = {
        name: partial(shutil.copyfile, whole.file(name)) for name in whole.hashes
    }
    wanted |= {name: partial(shutil.copyfile, files / name) for name in manifest.segment_files}
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
