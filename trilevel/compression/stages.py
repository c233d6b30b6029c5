"""One stage of a plan: the change, the training behind it, what it did to size, speed and quality."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.compression.distill import Distillation, DistillConfig
from trilevel.compression.exits import ExitsConfig, with_exits
from trilevel.compression.measure import latency_ms, size
from trilevel.compression.plan import Scan, Stage
from trilevel.compression.prune import PruneConfig, prune
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize, targets
from trilevel.compression.sensitivity import LayerLoss, choose_skips, sensitivity
from trilevel.compression.task import CompressionTask
from trilevel.compression.written import read_json, write_json
from trilevel.errors import TrilevelError
from trilevel.training.dropout import layer_dropout, without_dropout
from trilevel.training.loop import fit

TRAINING, LOG, SCAN = "training", "log.csv", "scan.json"
Progress = Callable[[str, float], None]
"""Told what is being done and how far it is, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What all stages share.

    Attributes:
        task: the model and its data.
        losses: what is learned from the teacher; None for labels alone.
        teacher: it.
        seed: of training.
        progress: see `Progress`.
        show_progress: draw the bar of training.
    """

    task: CompressionTask
    losses: DistillConfig | None
    teacher: nn.Module
    seed: int
    progress: Progress
    show_progress: bool


def run_stage(course: Course, stage: Stage, model: nn.Module, folder: Path, key: str, before: float) -> None:
    """Do a stage, from where it was stopped if it was, and write its run to `folder`, the report last.

    Args:
        course: see there.
        stage: what is done.
        model: float, in evaluation mode; left alone.
        folder: of the stage.
        key: hash of all that decides the result, kept in the report.
        before: quality of `model`.
    """
    task = course.task
    report: dict[str, Any] = {"stage": stage.name, "key": key, "quality_before": before}
    made, report["details"] = _changed(course, stage, model, folder, key)
    if not stage.recovery.is_empty:
        course.progress(f"{stage.name}: quality before training", 0.0)
        report["quality_untrained"] = task.evaluate(made.eval())[task.metric]
        report["training"] = _trained(course, stage, made, folder)
    report |= size(made.eval())
    result = freeze(made) if stage.name == "quantize" else made
    course.progress(f"{stage.name}: quality", 0.5)
    report["metrics"] = task.evaluate(result)
    report["quality"] = report["metrics"][task.metric]
    if not math.isfinite(report["quality"]):
        raise TrilevelError(f"{task.metric} is {report['quality']} after {stage.name}; keep more, or skip layers.")
    course.progress(f"{stage.name}: time", 0.9)
    times = latency_ms({"source": task.model, "own": result}, task.single(), task.forward)
    report |= {"latency_ms": times["own"], "source_latency_ms": times["source"]}
    task.save(folder, result, report)
    shutil.rmtree(folder / TRAINING, ignore_errors=True)
    (folder / SCAN).unlink(missing_ok=True)


def _changed(
    course: Course, stage: Stage, model: nn.Module, folder: Path, key: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that training starts from; the same whenever the stage is run again."""
    task, config = course.task, stage.config
    if isinstance(config, PruneConfig):
        course.progress("prune: importance", 0.0)
        made, found = prune(model, config, task.calibration, task.importance)
        return made, found.to_dict()
    if isinstance(config, QuantizeConfig):
        rows = _scanned(course, config, stage.scan, model, folder, key)
        chosen = _skips(rows, stage.scan)
        config = replace(config, skip=(*config.skip, *chosen))
        course.progress("quantize: calibration", 0.0)
        made = quantize(model, config, task.calibration, task.forward)
        return made, {"modules": len(targets(model, config)), "skip": list(config.skip), "scan": rows}
    if isinstance(config, ExitsConfig):
        cut: Any = with_exits(model, config)
        return cut, {"after": list(cut.config.exits)}
    return copy.deepcopy(model), {}


def _scanned(
    course: Course, config: QuantizeConfig, scan: Scan | None, model: nn.Module, folder: Path, key: str
) -> list[LayerLoss]:
    """The table of the layers, kept until the stage is done: it may take longer than the training."""
    if scan is None:
        return []
    kept = read_json(folder / SCAN)
    if kept.get("key") == key:
        rows: list[LayerLoss] = kept["rows"]
        return rows
    task, count, done = course.task, len(targets(model, config)) + 1, 0

    def quality(changed: nn.Module) -> float:
        nonlocal done
        course.progress("quantize: each layer alone", done / count)
        done += 1
        return task.evaluate(changed, limit=scan.examples)[task.metric]

    rows = sensitivity(model, config, task.calibration, quality, task.forward)
    write_json(folder / SCAN, {"key": key, "rows": rows})
    return rows


def _skips(rows: list[LayerLoss], scan: Scan | None) -> tuple[str, ...]:
    if scan is None:
        return ()
    harmful = tuple(row["name"] for row in rows if row["loss"] > 0)
    chosen = harmful if scan.skip_budget is None else choose_skips(rows, scan.skip_budget)
    return tuple(name for name in harmful if name in chosen)[: scan.max_skips]


def _trained(course: Course, stage: Stage, made: nn.Module, folder: Path) -> dict[str, Any]:
    """Train in place; what it took."""
    task, losses = course.task, course.losses
    config = stage.recovery.config(task.steps_of, course.seed)
    objective: Any = partial(_of_labels, task)
    if losses is not None:
        objective = Distillation(
            losses,
            course.teacher.to(next(made.parameters()).device),
            made,
            task.forward,
            task.supervised if task.has_labels else None,
            bfloat16=config.precision == "bf16-mixed",
        )
    # dropout undid what training with rounding learned on MiniLM, and a teacher's output has no noise
    is_quiet = losses is not None or stage.name == "quantize"
    course.progress(f"{stage.name}: training", 0.0)
    with ExitStack() as stack:
        if is_quiet:
            stack.enter_context(without_dropout(made))
        if isinstance(stage.config, ExitsConfig):
            encoder: Any = made.encoder
            stack.enter_context(layer_dropout(encoder.stack.blocks, stage.config.layer_dropout))
        result = fit(
            made,
            task.batches,
            objective,
            config=config,
            out_dir=folder / TRAINING,
            model_config={"stage": stage.name},
            show_progress=course.show_progress,
        )
    for model in (made, course.teacher):
        model.cpu()
    shutil.copyfile(result.log, folder / LOG)
    # no time: a resumed run knows that of its own part alone
    return {"steps": result.step, "learning_rate": config.learning_rate}


def _of_labels(task: CompressionTask, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    outputs = task.forward(model, batch)
    parts = task.supervised(outputs, batch)
    if outputs.exits is not None:
        each = [task.supervised(replace(outputs, logits=said), batch)["loss"] for said in outputs.exits.unbind(1)]
        parts["exits"] = torch.stack(each).mean()
        parts["loss"] = parts["loss"] + parts["exits"]
    return parts
