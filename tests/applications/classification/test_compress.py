"""Text classifiers compressed: a run that is evaluated as any other, bit for bit what was judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.applications.classification.tiny import RECIPE, make_rows, train_tiny, write_rows
from trilevel.applications.classification.checkpoint import load_run
from trilevel.applications.classification.compress import load_task
from trilevel.applications.classification.evaluate import evaluate, held_out, report
from trilevel.applications.classification.recipe import Schedule
from trilevel.applications.classification.score import classify
from trilevel.applications.kinds import kind_of
from trilevel.compression import stages
from trilevel.compression.compress import compress
from trilevel.compression.distill import DistillConfig
from trilevel.compression.layers import FrozenEmbedding
from trilevel.compression.plan import CompressionPlan, Recovery, Stage
from trilevel.compression.prune import PruneConfig
from trilevel.compression.quantize import QuantizeConfig
from trilevel.errors import ConfigError, InputError
from trilevel.training.loop import fit

PLAN = CompressionPlan(
    stages=(
        Stage(
            name="prune",
            config=PruneConfig(keep_heads=0.8, keep_ffn=0.6, multiple=1),
            recovery=Recovery(steps=3),
        ),
        Stage(name="quantize", config=QuantizeConfig()),
    ),
    data={"batch_size": 8},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("compress")
    train_tiny(made, recipe=replace(RECIPE, schedule=Schedule(steps=40)))
    task = load_task(made / "run", options=PLAN.data)
    compress(task, PLAN, made / "small", show_progress=False)
    return made


def test_the_result_is_a_run(folder: Path) -> None:
    assert kind_of(folder / "small") == "classification"
    run, old = load_run(folder / "small"), load_run(folder / "run")
    assert run.origin == old.origin
    assert (run.step, run.steps) == (40, 40)
    assert any(isinstance(part, FrozenEmbedding) for part in run.model.modules())
    assert run.model.config.encoder.ffn_dim != old.model.config.encoder.ffn_dim
    rows = held_out(run)
    task = load_task(folder / "run", options=PLAN.data)
    assert report(evaluate(run, rows.examples))["accuracy"] == task.evaluate(run.model)["accuracy"]
    assert classify(run, ["w1 fine", "w2 dull"]).argmax(-1).tolist() == [1, 0]


def test_dropout_is_off_where_rounding_or_a_teacher_is_learned_from(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[set[float]] = []

    def watched(model: nn.Module, *given: Any, **options: Any) -> Any:
        rates.append({part.p for part in model.modules() if isinstance(part, nn.Dropout)})
        return fit(model, *given, **options)

    monkeypatch.setattr(stages, "fit", watched)
    prune, rounding = (replace(stage, recovery=Recovery(steps=1)) for stage in PLAN.stages)
    task = load_task(folder / "run", options=PLAN.data)
    for losses in (None, DistillConfig()):
        plan = replace(PLAN, stages=(prune, rounding), losses=losses)
        compress(task, plan, tmp_path / str(losses is None), show_progress=False)
    assert rates == [{0.1}, {0.0}, {0.0}, {0.0}]
    small = load_run(tmp_path / "True").model
    assert {part.p for part in small.modules() if isinstance(part, nn.Dropout)} == {0.1}


def test_calibration_holds_all_lengths(folder: Path) -> None:
    task = load_task(folder / "run")
    lengths = {batch["input_ids"].shape[1] for batch in task.calibration}
    assert min(lengths) <= 6
    assert max(lengths) >= 15
    assert task.evaluate(task.model, limit=3)["examples"] == 3
    assert task.steps_of(2) > task.steps_of(1) > 0
    with torch.no_grad():
        assert task.single()["input_ids"].shape[0] == 1


def test_refused(folder: Path, tmp_path: Path) -> None:
    rows = [row | {"label": "neutral"} for row in make_rows()]
    with pytest.raises(InputError, match=r"at least two classes|unknown labels"):
        load_task(folder / "run", data=write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ConfigError, match="batch_size=0"):
        load_task(folder / "run", options={"batch_size": 0})
    with pytest.raises(ConfigError, match="unknown key 'crop_padding'"):
        load_task(folder / "run", options={"crop_padding": 1})


def test_teachers(folder: Path, tmp_path: Path) -> None:
    task = load_task(folder / "run")
    task.check_teacher(task.load_teacher(folder / "run")[0])
    data = write_rows(tmp_path / "three.jsonl", [*make_rows(), *(row | {"label": "so"} for row in make_rows(60, 5))])
    train_tiny(
        folder, "three", path=data, encoder=folder / "encoder", recipe=replace(RECIPE, schedule=Schedule(steps=2))
    )
    with pytest.raises(ConfigError, match=r"the teacher has the classes \('neg', 'pos', 'so'\)"):
        task.check_teacher(task.load_teacher(folder / "three")[0])
