"""`trilevel compress`: output, exit codes, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.applications.classification.tiny import RECIPE, train_tiny
from tests.compression.tasks import interrupt_at, tiny_run
from trilevel.applications.classification.recipe import Schedule
from trilevel.cli.main import app
from trilevel.errors import CheckpointError

PLAN = """
[prune]
keep_ffn = 0.5
keep_heads = 1.0
multiple = 8
[prune.train]
steps = 4
[distill]
[quantize]
max_skips = 1
scan_examples = 9
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a plan, and the result."""
    made = tmp_path_factory.mktemp("compress")
    tiny_run(made)
    (made / "plan.toml").write_text(PLAN)
    return made


def call(*arguments: object, cache: Path) -> Result:
    environment = {"COLUMNS": "160", "XDG_CACHE_HOME": str(cache)}
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def compress(folder: Path, out: str, *options: object, plan: Path | None = None) -> Result:
    return call(
        "compress", folder / "run", folder / out, "--plan", plan or folder / "plan.toml", *options, cache=folder / "c"
    )


def test_it_says_what_it_did_and_the_result_is_used_as_any_run(folder: Path) -> None:
    result = compress(folder, "small")
    assert result.exit_code == 0, result.output
    assert "held-out examples" in result.stdout
    assert "each layer alone quantized" in result.stdout
    assert "of the bytes" in result.stdout
    for stage in ("source", "prune", "quantize"):
        assert stage in result.stdout
    found = json.loads((folder / "small" / "report.json").read_text())
    evaluated = call("evaluate", "images", folder / "small", "--split", "valid", cache=folder / "c")
    assert evaluated.exit_code == 0, evaluated.output
    document = json.loads(evaluated.stdout.splitlines()[-1])
    assert document["accuracy"] == found["quality"]
    assert document["parameters"] == found["stages"][-1]["parameters"] < found["source"]["parameters"]
    image = next((folder / "images" / "lying").glob("*.png"))
    predicted = call("predict", folder / "small", image, "--json", cache=folder / "c")
    assert json.loads(predicted.stdout)["label"] in ("lying", "standing")
    # nothing is left to do
    again = compress(folder, "small", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == found


def test_too_much_loss_and_another_plan_end_with_2(folder: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor.toml"
    poor.write_text("[quantize]\n")
    # no loss at all is a bound that only an equal model keeps
    result = compress(folder, "bound", "--max-loss", "-0.5", plan=poor)
    assert (result.exit_code, "max_loss=-0.5 must be >= 0" in result.stderr) == (2, True)
    assert compress(folder, "small2", plan=poor).exit_code == 0
    result = compress(folder, "small2")
    assert (result.exit_code, "holds another compression" in result.stderr) == (2, True)


def test_ctrl_c_says_how_to_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        result = compress(folder, "stopped")
    assert result.exit_code == 130
    assert "Run the same command again to go on from there." in result.stderr
    assert compress(folder, "stopped").exit_code == 0


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[prune]\nkeep_heads = 2.0\n")
    result = compress(folder, "bad", plan=bad)
    assert (result.exit_code, f"{bad}: [prune] " in result.stderr) == (2, True)
    (tmp_path / "empty").mkdir()
    result = call("compress", tmp_path / "empty", tmp_path / "out", "--plan", folder / "plan.toml", cache=tmp_path)
    assert (result.exit_code, "holds no model of trilevel's" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
    result = compress(folder, "gone", "--data", tmp_path / "gone")
    assert result.exit_code == 2
    assert "gone" in result.stderr
    result = compress(folder, "teacher", "--teacher", tmp_path / "nowhere")
    assert (result.exit_code, "there is no trained image classifier" in result.stderr) == (2, True)


def test_texts_are_told_from_images(tmp_path: Path) -> None:
    from trilevel.applications.compress import load_task

    train_tiny(tmp_path, recipe=replace(RECIPE, schedule=Schedule(steps=2)))
    assert load_task(tmp_path / "run").kind == "classification"
    assert load_task(tmp_path / "encoder").kind == "embedding"
    with pytest.raises(CheckpointError):
        load_task("no/such/encoder")


def test_the_seed_orders_the_examples_and_the_plan_may_name_its_own(tmp_path: Path) -> None:
    from trilevel.applications.compress import load_task

    train_tiny(tmp_path, recipe=replace(RECIPE, schedule=Schedule(steps=2)))

    def first(seed: int, options: dict[str, Any] | None = None) -> list[list[int]]:
        task: Any = load_task(tmp_path / "run", options=options, seed=seed)
        found: list[list[int]] = task.batches.batch(0)["input_ids"].tolist()
        return found

    assert first(0) == first(0) != first(1)
    assert first(1, {"seed": 0}) == first(0)
