"""Exits as a stage of a plan: a run with exits is pruned, rounded, saved and read like others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.applications.images.tiny import RECIPE, train_tiny
from trilevel.applications.images.checkpoint import load_run
from trilevel.applications.images.compress import load_task
from trilevel.applications.images.recipe import Schedule
from trilevel.compression.compress import compress
from trilevel.compression.exits import ExitsConfig, with_exits
from trilevel.compression.layers import FrozenLinear
from trilevel.compression.plan import read_plan
from trilevel.errors import ConfigError

PLAN = """
[prune]
keep_ffn = 0.5
[exits]
segments = 2
layer_dropout = 0.1
[exits.train]
steps = 60
learning_rate = 3e-3
[distill]
[quantize]
[quantize.train]
steps = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("exits")
    train_tiny(made, recipe=replace(RECIPE, schedule=Schedule(steps=12)))
    return made


@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_plan_gives_a_run_with_exits(folder: Path, tmp_path: Path, *, has_teacher: bool) -> None:
    text = PLAN if has_teacher else PLAN.replace("[distill]\n", "")
    (tmp_path / "plan.toml").write_text(text)
    task = load_task(folder / "run", cache=folder / "cache")
    made = compress(task, read_plan(tmp_path / "plan.toml"), tmp_path / "out", show_progress=False)
    assert [row["stage"] for row in made.report["stages"]] == ["prune", "exits", "quantize"]
    assert made.report["stages"][1]["details"] == {"after": [1]}
    model: Any = load_run(tmp_path / "out").model
    assert model.config.exits == (1,)
    assert isinstance(model.exits[0].head.logits, FrozenLinear)
    pixels = task.calibration[0]["pixels"]
    with torch.no_grad():
        found = model(pixels, return_exits=True)
        torch.testing.assert_close(found[:, -1], model(pixels))
    # the inner head was trained: it knows more than one that was not
    labels = task.calibration[0]["labels"]
    trained = nn.functional.cross_entropy(found[:, 0], labels)
    untrained: Any = with_exits(task.model, ExitsConfig(segments=2))
    with torch.no_grad():
        assert trained < nn.functional.cross_entropy(untrained(pixels, return_exits=True)[:, 0], labels)
    with pytest.raises(ConfigError, match=r"the model has exits behind its blocks \[1\]; leave out \[exits\]"):
        with_exits(model, ExitsConfig())


def test_what_has_no_exits() -> None:
    with pytest.raises(ConfigError, match="Linear cannot have exits; image and text classifiers can"):
        with_exits(nn.Linear(3, 5), ExitsConfig())
    with pytest.raises(ConfigError, match="segments=1 must be >= 2"):
        ExitsConfig(segments=1)
    with pytest.raises(ConfigError, match=r"layer_dropout=1\.0 must be >= 0 and < 1"):
        ExitsConfig(layer_dropout=1.0)


def test_exits_are_trained(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text("[exits]\n")
    with pytest.raises(ConfigError, match=r"exits without training is nothing; .* in exits.train"):
        read_plan(tmp_path / "plan.toml")
