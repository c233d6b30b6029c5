"""`trilevel train images`, `evaluate images`, `predict` with images: output, exit codes, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.applications.images.tiny import SIZE, write_images
from trilevel.cli.main import app

RECIPE = """
[data]
batch_size = 16
valid_fraction = 0.2
[model]
dim = 24
num_heads = 3
num_layers = 2
ffn_dim = 32
[levels]
window = 5
num_global_tokens = 3
[train]
learning_rate = 3.0e-3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and two runs, dense and multi-level."""
    made = tmp_path_factory.mktemp("cli")
    write_images(made / "images")
    (made / "recipe.toml").write_text(RECIPE)
    runs = {"dense": ("--dense", "--steps", 150), "run": ("--teacher", made / "dense", "--steps", 30)}
    for name, options in runs.items():
        result = train(made, name, *options)
        assert result.exit_code == 0, result.output
    return made


def call(*arguments: object, cache: Path) -> Result:
    environment = {"COLUMNS": "160", "XDG_CACHE_HOME": str(cache)}
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def train(folder: Path, name: str, *options: object) -> Result:
    return call(
        *("train", "images", folder / "images", "--out", folder / name, "--recipe", folder / "recipe.toml", *options),
        cache=folder / "cache",
    )


def test_training_says_what_it_does(folder: Path) -> None:
    result = train(folder, "few", "--epochs", 1, "--limit", 40, "--size", "8x10")
    assert result.exit_code == 0, result.output
    assert "steps, loss" in result.stdout
    assert "trilevel evaluate images" in result.stdout
    assert "8 x 10 x 1 pixels, 20 tokens" in result.stderr
    assert "standing" in result.stderr
    # the same command again has nothing left to do
    assert train(folder, "few", "--epochs", 1, "--limit", 40, "--size", "8x10").exit_code == 0
    result = train(folder, "few", "--epochs", 1)
    assert (result.exit_code, "is of another run; different are: " in result.stderr) == (2, True)


def test_evaluate_and_compare(folder: Path) -> None:
    result = call("evaluate", "images", folder / "run", "--compare", folder / "dense", cache=folder / "cache")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["case"], found["split"], found["tokens"]) == ("images", "valid", (SIZE // 2) ** 2)
    low, high = found["accuracy_interval"]
    assert 0 < low < found["accuracy"] <= high + 1e-9
    assert found["accuracy"] > 0.9
    assert (found["dense"], found["compare"]["dense"]) == (False, True)
    assert found["teacher"] == str(folder / "dense")
    assert found["compare"]["difference"].keys() >= {"points", "points_interval"}
    for part in ("macro F1", "said lying", "points ["):
        assert part in result.stdout
    alone = call("evaluate", "images", folder / "run", folder / "images", "--json", cache=folder / "cache")
    assert json.loads(alone.stdout)["accuracy"] == found["accuracy"]


def test_predict_tells_the_runs_apart(folder: Path) -> None:
    inputs = (folder / "images" / "lying" / "1.png", folder / "images" / "standing")
    result = call("predict", folder / "run", *inputs, "--json", cache=folder / "cache")
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[0]["source"] == str(inputs[0])
    assert [row["label"] for row in found].count("standing") > 50
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)
    table = call("predict", folder / "run", inputs[0], cache=folder / "cache")
    assert "lying 0." in table.stdout
    result = call("predict", folder / "run", inputs[0], "--text-column", "a", cache=folder / "cache")
    assert (result.exit_code, "leave --text-column out" in result.stderr) == (2, True)
    result = call("predict", folder / "run", "a text", cache=folder / "cache")
    assert (result.exit_code, "a text: not a readable image" in result.stderr) == (2, True)


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    cases = {
        "none": "does not exist; a folder of images or an .npz archive is needed",
        "empty": "holds no folders; unknown layout",
        "one": "at least two classes are needed",
        "damaged": "7.png: not a readable image",
    }
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one", labels=("lying",))
    write_images(tmp_path / "damaged", 9)
    (tmp_path / "damaged" / "lying" / "7.png").write_bytes(b"")
    for name, message in cases.items():
        result = call("train", "images", tmp_path / name, "--out", tmp_path / "run", cache=tmp_path / "cache")
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    result = train(folder, "new", "--size", "big")
    assert (result.exit_code, "size='big' must be a number of pixels" in result.stderr) == (2, True)
    result = train(folder, "new", "--teacher", tmp_path)
    assert (result.exit_code, "no trained image classifier" in result.stderr) == (2, True)
    result = call("evaluate", "images", tmp_path, cache=tmp_path / "cache")
    assert (result.exit_code, "no trained image classifier" in result.stderr) == (2, True)
    assert not (tmp_path / "run").exists()
