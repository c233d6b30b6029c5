"""Small plans, and what is needed to try them on the tiny image classifier."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.applications.images.tiny import RECIPE, train_tiny
from trilevel.applications.images.batches import ImageBatches
from trilevel.applications.images.compress import ImageTask, load_task
from trilevel.applications.images.recipe import Schedule
from trilevel.compression.compress import Compression, compress
from trilevel.compression.plan import CompressionPlan, read_plan

FULL = """
[prune]
keep_heads = 0.7
keep_ffn = 0.5
multiple = 8
[prune.train]
steps = 7
learning_rate = 1.0e-3
checkpoint_every = 3
[distill]
layers = [0, -1]
[distill.train]
steps = 5
checkpoint_every = 2
[quantize]
[quantize.train]
steps = 5
learning_rate = 1.0e-4
checkpoint_every = 2
[data]
batch_size = 16
crop_padding = 1
"""
ROUNDED = "[quantize]\n"


def plan_of(folder: Path, text: str = FULL, name: str = "plan.toml") -> CompressionPlan:
    path = folder / name
    path.write_text(text)
    return read_plan(path)


def tiny_run(folder: Path) -> Path:
    """A trained classifier in `folder`."""
    train_tiny(folder, recipe=replace(RECIPE, schedule=Schedule(steps=100)))
    return folder / "run"


def image_task(run: Path, plan: CompressionPlan, **options: Any) -> ImageTask:
    return load_task(run, options=plan.data, cache=run.parent / "cache", **options)


def compressed(run: Path, out: Path, text: str = FULL, **options: Any) -> Compression:
    plan = plan_of(out.parent, text, f"{out.name}.toml")
    return compress(image_task(run, plan), plan, out, show_progress=False, **options)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C while training reads its batch of this number, counted over all stages."""
    whole, count = ImageBatches.batch, 0

    def batch(self: ImageBatches, step: int) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        if count == number:
            signal.raise_signal(signal.SIGINT)
        return whole(self, step)

    monkeypatch.setattr(ImageBatches, "batch", batch)
