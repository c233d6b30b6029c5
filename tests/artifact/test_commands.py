"""`trilevel export`, `verify`, `predict` and `info` of an artifact: output, exit codes, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.applications.classification.tiny import make_rows, write_encoder, write_rows
from tests.artifact import tasks
from trilevel.artifact import verify
from trilevel.artifact.manifest import Artifact, read_artifact, write_artifact
from trilevel.cli.main import app


def call(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, env={"COLUMNS": "200"})
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, task_artifact: Callable[[str], Artifact]) -> Path:
    """`encoder`, `vectors`, artifact of one, and `classes` and `images`, artifacts of classifiers."""
    made = tmp_path_factory.mktemp("commands")
    for name, kind in (("vectors", "embedding"), ("classes", "classification"), ("images", "images")):
        shutil.copytree(task_artifact(kind).path, made / name)
    write_encoder(made / "encoder")
    return made


@pytest.fixture
def exporter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter of encoders that takes no time: it copies an artifact."""

    def export(source: str, out: Path, *, target: str, tell: Callable[[str], None]) -> Artifact:
        tell(f"exporting {Path(source).name} for {target}")
        own = read_artifact(folder / "vectors")
        files: dict[str, Any] = {name: partial(shutil.copyfile, own.file(name)) for name in own.hashes}
        return write_artifact(out, own.manifest, files)

    monkeypatch.setattr("trilevel.applications.embedding.artifact.export_embedding", export)


@pytest.mark.usefixtures("exporter")
def test_export(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("export", folder / "encoder", out, "--target", "cpu")
    assert result.exit_code == 0, result.output
    assert "exporting encoder for cpu ..." in result.stderr
    assert "onnxruntime" in result.stdout
    assert "embedding, float32" in result.stdout
    result = call("export", folder / "encoder", out, "--runtime-check", "onnxruntime", "--json")
    assert "comparing with onnxruntime in float32" in result.stderr
    assert len(json.loads(result.stdout)["parity"]) == 3
    read_artifact(out)


@pytest.mark.usefixtures("exporter")
def test_a_runtime_that_must_agree_and_does_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify.TOLERANCES, ("float32", "float32"), 0.0)
    result = call("export", folder / "encoder", tmp_path / "out", "--runtime-check", "openvino")
    assert result.exit_code == 2
    assert "was not written, as the answers are not torch's: openvino" in result.stderr
    assert not (tmp_path / "out").exists()


def test_vectors_as_table_and_json(folder: Path) -> None:
    result = call("predict", folder / "vectors", "fine w1", "--json", "--runtime", "torch")
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    assert values["text"] == "fine w1"
    assert len(values["vector"]) == 30
    assert "torch" in result.stderr
    assert "(30 numbers)" in call("predict", folder / "vectors", "fine w1", "--threads", 1).stdout


def test_texts_files_and_standard_input(folder: Path, tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.jsonl", make_rows(5))
    result = call("predict", folder / "classes", table, "lovely w1", "--json", "--runtime", "onnxruntime")
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row.get("source") for row in found] == [*(f"{table}:{line}" for line in range(1, 6)), None]
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)
    lines = '"lovely w1"\n\n{"text": "dull"}\n{"text": ""}\n'
    result = call("predict", folder / "classes", "-", "--json", stdin=lines)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["source"] for row in rows] == ["standard input:1", "standard input:3", "standard input:4"]
    assert rows[0]["label"] == found[-1]["label"]
    assert rows[2]["label"] is None
    table_text = call("predict", folder / "classes", "lovely w1").stdout
    assert found[-1]["label"] in table_text


@pytest.mark.parametrize(
    ("lines", "message"),
    [("{", "standard input:1: no JSON"), ("7", "a int; a text or an object"), ('{"a": 1}', "standard input:1")],
)
def test_standard_input_that_cannot_be_used(folder: Path, lines: str, message: str) -> None:
    result = call("predict", folder / "classes", "-", stdin=lines)
    assert result.exit_code == 2
    assert message in result.stderr


def test_images(folder: Path, tmp_path: Path) -> None:
    paths = tasks.write_pictures(tmp_path / "pictures")
    result = call("predict", folder / "images", tmp_path / "pictures", "--json")
    assert [json.loads(line)["source"] for line in result.stdout.splitlines()] == list(map(str, paths))
    result = call("predict", folder / "images", "-", "--json", stdin=json.dumps(str(paths[0])))
    assert json.loads(result.stdout)["source"] == str(paths[0])
    assert call("predict", folder / "images", "-", stdin="{}").exit_code == 2
    assert "no column" in call("predict", folder / "images", paths[0], "--text-column", "a").stderr


def test_options_of_artifacts_alone(folder: Path) -> None:
    result = call("predict", folder / "encoder", "fine", "--runtime", "openvino")
    assert result.exit_code == 2
    assert "is no artifact, and runs in torch" in result.stderr


def test_verify(folder: Path, tmp_path: Path) -> None:
    table = write_rows(tmp_path / "rows.jsonl", make_rows(5))
    result = call("verify", folder / "classes", "--data", table, "--json", "--threads", 1)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    names = [(row["checked"]["runtime"], row["checked"]["precision"]) for row in rows]
    assert names == [
        ("onnxruntime", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"), ("torch", "float32")
    ]  # fmt: skip
    assert all(row["holds"] and row["data"]["calls"] == 1 for row in rows)
    assert [row["overlap"] for row in rows if row["checked"]["precision"] == "float32"] == [1.0, 1.0, 1.0]
    shown = call("verify", folder / "classes", "--runtime", "onnxruntime")
    assert shown.exit_code == 0
    assert "holds" in shown.stdout


def test_verify_of_what_is_damaged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = Path(shutil.copytree(folder / "classes", tmp_path / "copied"))
    monkeypatch.setitem(verify.TOLERANCES, ("float32", "float32"), 0.0)
    result = call("verify", copied, "--runtime", "openvino")
    assert result.exit_code == 1
    assert "FAILS" in result.stdout
    (copied / "model.onnx").write_bytes(b"no graph")
    result = call("verify", copied)
    assert result.exit_code == 1
    assert "changed or damaged" in result.stderr
    assert call("predict", copied, "fine").exit_code == 2


def test_info(folder: Path) -> None:
    values = json.loads(call("info", folder / "classes", "--json").stdout)
    assert values["manifest"]["task"] == "classification"
    assert values["bytes"]["model.onnx"] > 10_000
    shown = call("info", folder / "classes").stdout
    for word in ("classification", "float32", "levels", "labels", "file model.onnx", "input input_ids"):
        assert word in shown
    assert call("info", folder / "encoder").exit_code == 2


def test_export_to_what_is_something_else(folder: Path) -> None:
    result = call("export", folder / "encoder", folder / "encoder")
    assert result.exit_code == 2
    assert "is no artifact; it is left alone" in result.stderr
    assert call("export", folder / "nothing" / "here", folder / "out").exit_code == 2
