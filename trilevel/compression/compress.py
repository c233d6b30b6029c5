"""Compression from end to end: the stages of a plan one after another, each kept, measured and resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trilevel.compression.distill import Distillation
from trilevel.compression.measure import latency_ms, size
from trilevel.compression.plan import CompressionPlan
from trilevel.compression.quantize import QuantizeConfig, targets
from trilevel.compression.stages import Course, Progress, run_stage
from trilevel.compression.task import CompressionTask
from trilevel.compression.written import read_json, write_json
from trilevel.errors import CheckpointError, ConfigError, InputError, QualityError
from trilevel.training.interrupt import TrainingInterrupted

IDENTITY, STAGES, REPORT = "compression.json", "stages", "report.json"
_GO_ON = "Run the same command again to go on from there."


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What compression made.

    Attributes:
        folder: a run that the application reads.
        model: the compressed model, in evaluation mode.
        report: JSON types: `source`, `stages`, and the last one's numbers beside the source's.
    """

    folder: Path
    model: nn.Module
    report: dict[str, Any]


def compress(
    task: CompressionTask,
    plan: CompressionPlan,
    out: str | Path,
    *,
    teacher: str | Path | None = None,
    max_loss: float | None = None,
    seed: int = 0,
    progress: Progress = lambda _what, _done: None,
    show_progress: bool = True,
) -> Compression:
    """Run a plan and write `out`: a run with the last stage's model, `report.json`, and `stages/N-NAME/`, a run each.

    Stages that are done are not done again, and one that was stopped goes on from its last checkpoint and ends with the
    same bits, when the same call is made again.

    Args:
        task: the model and its data.
        plan: what is done.
        out: folder to write.
        teacher: a run that teaches in place of the uncompressed model.
        max_loss: quality that may be lost, in the unit of `task.metric`.
        seed: of training.
        progress: told what is done.
        show_progress: draw the bars of training.

    Raises:
        ConfigError: the plan does not suit the model, or another compression is in `out`.
        QualityError: more quality is lost than `max_loss`; the stages stay, the final run is not written.
        CheckpointError: `out` cannot be written, or what is there is damaged.
        KeyboardInterrupt: the user stopped; the message says how to go on.
    """
    folder = Path(out)
    if max_loss is not None and not max_loss >= 0:
        raise ConfigError(f"max_loss={max_loss} must be >= 0.")
    try:
        return _compress(task, plan, folder, teacher, max_loss, seed, progress, show_progress=show_progress)
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; finished stages are kept in {folder / STAGES}. {_GO_ON}") from None
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written ({error}); finished stages are unharmed. Free space, then run again."
        ) from error


def _compress(
    task: CompressionTask,
    plan: CompressionPlan,
    folder: Path,
    teacher: str | Path | None,
    max_loss: float | None,
    seed: int,
    progress: Progress,
    *,
    show_progress: bool,
) -> Compression:
    teaching, teacher_sha256 = (task.model, task.source_sha256) if teacher is None else task.load_teacher(teacher)
    task.check_teacher(teaching)
    _check(task, plan, teaching, has_teacher=teacher is not None)
    identity = {"kind": task.kind, "source": task.source_sha256, "data": task.data_sha256, "seed": seed}
    identity |= {"teacher": teacher_sha256, "plan": plan.to_dict()}
    _prepare(folder, identity)
    source = _source(task, folder, _key(identity, 0, plan), progress)
    course = Course(
        task=task, losses=plan.losses, teacher=teaching, seed=seed, progress=progress, show_progress=show_progress
    )
    model, rows = task.model, [source]
    for number, stage in enumerate(plan.stages, 1):
        where, key = folder / STAGES / f"{number}-{stage.name}", _key(identity, number, plan)
        if read_json(where / REPORT).get("key") != key:
            where.mkdir(parents=True, exist_ok=True)
            run_stage(course, stage, model, where, key, rows[-1]["quality"])
        # from the disk in any case: what a resumed run goes on with
        model = task.load(where)
        rows.append(read_json(where / REPORT))
    report = _report(task, plan, rows, max_loss)
    if max_loss is not None and not report["loss"] <= max_loss:
        raise QualityError(
            f"{task.metric} fell by {report['loss']:.4f} ({source['quality']:.4f} to {report['quality']:.4f}) and "
            f"max_loss={max_loss} is allowed; {folder} is not written, its stages are kept. Compress less or train "
            "longer in another folder, or allow more: the stages are then not done again."
        )
    task.save(folder, model, report)
    progress("done", 1.0)
    return Compression(folder=folder, model=model, report=report)


def _check(task: CompressionTask, plan: CompressionPlan, teacher: nn.Module, *, has_teacher: bool) -> None:
    """Raise `ConfigError` for what would fail after hours."""
    is_trained = any(not stage.recovery.is_empty for stage in plan.stages)
    if is_trained and plan.losses is None and not task.has_labels:
        raise ConfigError(
            "the data has no labels, and the plan trains without [distill]. Add the table, or give labelled data."
        )
    if has_teacher and plan.losses is None:
        raise ConfigError("a teacher is given and the plan has no table [distill] that says what is learned from it.")
    if plan.losses is not None:
        Distillation(plan.losses, teacher, task.model, task.forward, None)
    # tells a model that is quantized already, and names in skip that it has not
    for stage in plan.stages:
        targets(task.model, stage.config if isinstance(stage.config, QuantizeConfig) else QuantizeConfig())


def _prepare(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder, or see that the same compression is in it.

    Raises:
        ConfigError: another one is.
    """
    there = read_json(folder / IDENTITY)
    if not there:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists and holds no compression of this plan; choose another folder.")
        write_json(folder / IDENTITY, identity)
        return
    # as JSON has it
    wanted = _flat(json.loads(json.dumps(identity)))
    found = _flat(there)
    changed = [
        f"{name} was {found.get(name, 'absent')} and is {wanted.get(name, 'absent')}"
        for name in sorted(set(found) | set(wanted))
        if found.get(name, "absent") != wanted.get(name, "absent")
    ]
    if changed:
        raise ConfigError(
            f"{folder} holds another compression: {'; '.join(changed)}. Give the same plan, model and data to go on, "
            "or choose another folder."
        )


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            found |= _flat(value, f"{path}.") or {path: {}}
        else:
            found[path] = f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else value
    return found


def _key(identity: Mapping[str, Any], number: int, plan: CompressionPlan) -> str:
    """The hash of what decides the first `number` stages."""
    part = replace(plan, stages=plan.stages[: max(1, number)]).to_dict() if number else None
    text = json.dumps({**identity, "plan": part}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _source(task: CompressionTask, folder: Path, key: str, progress: Progress) -> dict[str, Any]:
    """What the model is before compression, measured once."""
    path = folder / STAGES / "source.json"
    kept = read_json(path)
    if kept.get("key") == key:
        return kept
    progress("source: quality", 0.0)
    metrics = task.evaluate(task.model)
    if not metrics:
        raise InputError("no held-out example to measure quality on.")
    time = latency_ms({"own": task.model}, task.single(), task.forward)["own"]
    report: dict[str, Any] = {"stage": "source", "key": key, "metrics": metrics, "quality": metrics[task.metric]}
    report |= size(task.model) | {"latency_ms": time, "source_latency_ms": time}
    write_json(path, report)
    return report


def _report(
    task: CompressionTask, plan: CompressionPlan, rows: list[dict[str, Any]], max_loss: float | None
) -> dict[str, Any]:
    first, last = rows[0], rows[-1]
    return {
        "case": "compress",
        "kind": task.kind,
        "metric": task.metric,
        "plan": plan.to_dict(),
        "source": first,
        "stages": rows[1:],
        "quality": last["quality"],
        "loss": first["quality"] - last["quality"],
        "max_loss": max_loss,
        "size_ratio": last["bytes"] / first["bytes"],
        "speedup": last["source_latency_ms"] / last["latency_ms"],
    }
