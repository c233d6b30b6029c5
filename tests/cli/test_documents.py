"""`trilevel summarize`, `train documents`, `evaluate documents`: output, exit codes, bad input without a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from trilevel.applications.documents.checkpoint import save_run, shipped_tokenizer
from trilevel.applications.documents.model import DocumentModel, default_config
from trilevel.cli.main import app

MARKDOWN = """# Levels
Attention over long documents is expensive for every token. Local heads see a window of tokens.

## Global
Global heads see a few selected tokens <b>anywhere</b> & everywhere.
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    tokenizer = shipped_tokenizer()
    model = DocumentModel(default_config(tokenizer.vocab_size))
    torch.nn.init.normal_(model.score.weight)
    save_run(folder, model, tokenizer)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "d.md"
    path.write_text(MARKDOWN)
    return path


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert "Traceback" not in result.output
    return result


def test_text(run: Path, file: Path) -> None:
    result = call("summarize", file, "--checkpoint", run, "--sentences", 2)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2
    assert all(line in MARKDOWN.replace("<b>", "").replace("</b>", "") for line in result.stdout.splitlines())


def test_several_files_are_told_apart(run: Path, file: Path) -> None:
    result = call("summarize", file, file, "--checkpoint", run, "-n", 1)
    assert result.stdout.count(f"{file}: Levels") == 2


def test_json(run: Path, file: Path) -> None:
    result = call("summarize", file, "--checkpoint", run, "-n", 1, "--format", "json", "--focus", "0.5")
    record = json.loads(result.stdout)[0]
    assert len(record["sentences"]) == len(record["scores"]) == len(record["indices"]) == 1
    assert record["title"] == "Levels"
    assert record["units_left_out"] == 0


def test_html_escapes(run: Path, file: Path) -> None:
    result = call("summarize", file, "--checkpoint", run, "-n", 3, "--format", "html")
    assert result.stdout.startswith("<!doctype html>")
    assert "&amp; everywhere" in result.stdout
    assert "<mark" in result.stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty file"),
        ("binary.txt", b"a\x00b", "binary file"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("d.docx", b"text", "unknown kind of file"),
        ("code.md", b"```\nx\n```", "no text in this file"),
    ],
)
def test_bad_files(run: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    result = call("summarize", path, "--checkpoint", run)
    assert result.exit_code == 2
    assert message in result.stderr


def test_missing_file_and_directory(run: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.txt", "no such file"), (tmp_path, "a directory")):
        result = call("summarize", path, "--checkpoint", run)
        assert result.exit_code == 2
        assert message in result.stderr


def test_unreadable_file(run: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = call("summarize", file, "--checkpoint", run)
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


def test_one_word(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("word")
    assert call("summarize", path, "--checkpoint", run).stdout == "word\n"


@pytest.mark.slow
def test_five_megabytes_without_a_space(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("a" * 5_000_000)
    result = call("summarize", path, "--checkpoint", run)
    assert result.exit_code == 0
    assert "beyond the model's token limit" in result.stdout


def test_bad_checkpoints(run: Path, file: Path, tmp_path: Path) -> None:
    result = call("summarize", file, "--checkpoint", tmp_path / "none")
    assert (result.exit_code, "no checkpoint" in result.stderr) == (2, True)
    tokenizer = shipped_tokenizer()
    save_run(tmp_path / "damaged", DocumentModel(default_config(tokenizer.vocab_size)), tokenizer)
    weights = next((tmp_path / "damaged").rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = call("summarize", file, "--checkpoint", tmp_path / "damaged")
    assert result.exit_code == 2


def test_missing_extra(run: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "markdown_it", None)
    result = call("summarize", file, "--checkpoint", run)
    assert result.exit_code == 2
    assert "trilevel[readers]" in result.stderr


def test_bad_budget_and_focus(run: Path, file: Path) -> None:
    assert call("summarize", file, "--checkpoint", run, "-n", 0).exit_code == 2
    assert call("summarize", file, "--checkpoint", run, "-n", 1, "--words", 3).exit_code == 2
    assert call("summarize", file, "--checkpoint", run, "--focus", 7).exit_code == 2


def write_data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "docs"
    folder.mkdir(parents=True)
    text = MARKDOWN.replace("<b>", "").replace("</b>", "")
    row = {"title": "Levels", "text": text, "abstract": "Heads see a window of tokens."}
    rows = [json.dumps({**row, "split": split}) for split in ("train", "train", "valid", "test", "test")]
    import lzma

    (folder / "tech.jsonl.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    return tmp_path / "data"


def test_train_then_evaluate(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    for name, option in (("ours", []), ("dense", ["--dense"])):
        result = call("train", "documents", "--data", data, "--out", tmp_path / name, "--steps", 1, *option)
        assert result.exit_code == 0, result.output
        assert "1 steps" in result.stdout
    models = ["--checkpoint", tmp_path / "ours", "--dense-checkpoint", tmp_path / "dense"]
    result = call("evaluate", "documents", "--data", data, "--json", *models)
    document = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == (0 if all(bar["holds"] for bar in document["bars"]) else 1)
    assert document["documents"] == 2
    assert {"trilevel", "dense", "lead", "lexrank", "textrank", "oracle"} <= {r["system"] for r in document["rows"]}
    smoke = call("evaluate", "documents", "--data", data, "--smoke", *models)
    assert smoke.exit_code == 0
    assert json.loads(smoke.stdout.splitlines()[-1])["bars"] == []


def test_training_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRILEVEL_DATA", raising=False)
    result = call("train", "documents", "--out", tmp_path / "run")
    assert (result.exit_code, "TRILEVEL_DATA" in result.stderr) == (2, True)
    result = call("train", "documents", "--out", tmp_path / "run", "--long")
    assert (result.exit_code, "--start" in result.stderr) == (2, True)
    result = call("train", "documents", "--out", tmp_path / "run", "--data", tmp_path)
    assert (result.exit_code, "no such file" in result.stderr) == (2, True)
    recipe = tmp_path / "r.toml"
    recipe.write_text("[colour]\n")
    result = call("train", "documents", "--out", tmp_path / "run", "--recipe", recipe)
    assert (result.exit_code, "unknown table" in result.stderr) == (2, True)
