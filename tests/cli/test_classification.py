"""`trilevel train classification`, `evaluate classification`, `predict`: output, exit codes, bad input."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.applications.classification.tiny import make_rows, write_encoder, write_rows
from trilevel.cli.main import app

COLUMNS = ("--text-column", "text", "--label-column", "label")
RECIPE = "[data]\nbatch_size = 8\n[train]\nlearning_rate = 0.01\n"


def call(*arguments: object, width: str = "160") -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": width})
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def as_csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["text", "label"])
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def train(folder: Path, name: str, *options: object) -> Result:
    return call(
        *("train", "classification", folder / "rows.csv", *COLUMNS, "--out", folder / name),
        *("--recipe", folder / "recipe.toml", "--encoder", folder / "encoder", *options),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, an encoder, and two runs."""
    made = tmp_path_factory.mktemp("cli")
    rows = [*make_rows(), {"text": " ", "label": "pos"}]
    (made / "rows.csv").write_text(as_csv(rows), encoding="utf-8")
    (made / "recipe.toml").write_text(RECIPE)
    write_encoder(made / "encoder")
    for name, steps in (("run", 90), ("poor", 1)):
        result = train(made, name, "--steps", steps)
        assert result.exit_code == 0, result.output
    return made


def test_training_says_what_it_does(folder: Path, tmp_path: Path) -> None:
    for name in ("rows.csv", "recipe.toml"):
        shutil.copy(folder / name, tmp_path)
    shutil.copytree(folder / "encoder", tmp_path / "encoder")
    result = train(tmp_path, "run", "--epochs", 1, "--limit", 40, "--max-tokens", 9)
    assert result.exit_code == 0, result.output
    assert "steps, loss" in result.stdout
    assert "trilevel evaluate classification" in result.stdout
    assert "1 rows have no text and are left out" in result.stderr
    assert "longer than the model reads" in result.stderr
    assert "neg" in result.stderr
    # the same command again has nothing left to do
    assert train(tmp_path, "run", "--epochs", 1, "--limit", 40, "--max-tokens", 9).exit_code == 0


def test_evaluate(folder: Path) -> None:
    result = call("evaluate", "classification", folder / "run")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["split"], found["empty_rows"]) == ("valid", 1)
    low, high = found["accuracy_interval"]
    assert 0 < low < found["accuracy"] <= high <= 1
    assert "macro F1" in result.stdout
    assert "said neg" in result.stdout
    alone = call("evaluate", "classification", folder / "run", "--json")
    assert json.loads(alone.stdout)["accuracy"] == found["accuracy"]


def test_compare(folder: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", make_rows(60, seed=3))
    result = call("evaluate", "classification", folder / "run", other, "--compare", folder / "poor", "--limit", 50)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["rows"], found["split"], found["compare"]["rows"]) == (50, "all", 50)
    points = 100 * (found["accuracy"] - found["compare"]["accuracy"])
    assert found["compare"]["difference"]["points"] == pytest.approx(points)
    assert points > 10
    assert "points [" in result.stdout


def test_predict_texts_files_and_tables(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "note one.txt").write_text("w1 w2 lovely")
    (tmp_path / "table.csv").write_text("body,other\ndreadful w3,1\n,2\nfine w1,3\n")
    result = call(
        *("predict", folder / "run", "w4 dull w4", tmp_path / "note one.txt", tmp_path / "table.csv"),
        *("--text-column", "body", "--json"),
    )
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["label"] for row in found] == ["neg", "pos", "neg", None, "pos"]
    assert found[0]["text"] == "w4 dull w4"
    assert found[1]["source"] == str(tmp_path / "note one.txt")
    assert [row["source"] for row in found[2:]] == [f"{tmp_path / 'table.csv'}:{line}" for line in (2, 3, 4)]
    assert found[3]["probabilities"] is None
    assert set(found[0]["probabilities"]) == {"neg", "pos"}
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)


def test_predict_as_a_table_shows_texts_as_they_are(folder: Path) -> None:
    result = call("predict", folder / "run", "a [red]lovely[/] film", "fine " * 900)
    assert result.exit_code == 0, result.output
    assert "a [red]lovely[/] film" in result.stdout
    assert "…" in result.stdout
    assert "neg 0." in result.stdout


def test_a_table_uses_the_column_of_the_training(folder: Path) -> None:
    result = call("predict", folder / "run", folder / "rows.csv", "--json")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 121


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (("none.txt",), "none.txt: no such file"),
        (("none.csv",), "none.csv: no such file"),
        (("",), "an empty text"),
        (("rows.csv", "--text-column", "review"), "no column 'review'; the columns there are: 'text', 'label'"),
        (("recipe.toml",), "unknown kind of file '.toml'"),
        (("encoder",), "a directory"),
    ],
)
def test_bad_inputs_of_predict(
    folder: Path, monkeypatch: pytest.MonkeyPatch, inputs: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    result = call("predict", "run", *inputs)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file"),
        ("empty.csv", b"", "no rows"),
        ("rows.xlsx", b"PK", "unknown kind of file '.xlsx'"),
        ("latin.csv", b"text,label\ncaf\xe9,a\n", "not UTF-8"),
        ("columns.csv", b"review,label\na,b\n", "no column 'text'; the columns there are: 'review', 'label'"),
        ("label.csv", b"text,label\na,\n", "label.csv:2: no label in column 'label'"),
        ("one.csv", b"text,label\n" + b"".join(b"t%d,a\n" % n for n in range(50)), "at least two classes"),
        ("few.csv", b"text,label\n" + b"".join(b"t%d,l%d\n" % (n, n % 9) for n in range(50)), "fewer than 8"),
        ("quote.csv", b'text,label\n"a,b\n', "not CSV"),
    ],
)
def test_bad_data(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = call("train", "classification", tmp_path / name, *COLUMNS, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_bad_encoders_options_and_runs(folder: Path, tmp_path: Path) -> None:
    result = train(folder, "new", "--encoder", tmp_path / "none" / "there")
    assert (result.exit_code, "is no folder" in result.stderr) == (2, True)
    result = train(folder, "new", "--max-tokens", 10_000)
    assert (result.exit_code, "max_tokens=10000 must lie in" in result.stderr) == (2, True)
    result = train(folder, "run", "--steps", 3)
    assert (result.exit_code, "other settings" in result.stderr) == (2, True)
    result = train(folder, "new", "--steps", 0)
    assert (result.exit_code, "steps=0" in result.stderr) == (2, True)
    for command in (("evaluate", "classification", tmp_path), ("predict", tmp_path, "a text")):
        result = call(*command)
        assert (result.exit_code, "no trained classifier" in result.stderr) == (2, True)
    result = call("evaluate", "classification", folder / "run", "--compare", tmp_path)
    assert (result.exit_code, "no trained classifier" in result.stderr) == (2, True)
