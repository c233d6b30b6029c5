"""`trilevel convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.conversion.pretrained import make, save
from trilevel.cli.main import app

pytest.importorskip("scipy", reason="scipy comes with the extra 'convert'")
TEXT = "\n\n".join(" ".join(f"w{(7 * line + word) % 56}" for word in range(30)) + "." for line in range(400))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(make("bert"), tmp_path_factory.mktemp("bert"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def test_a_folder_is_converted_and_said_what_it_is(bert: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    result = call(bert, out, "--text", text, "--steps", 2, "--window", 5, "--ratio", "1:1:1", "--dense-heads", 3)
    assert result.exit_code == 0, result.output
    assert "heads: 2 local, 2 regional, 2 global, 3 dense" in result.stdout
    assert "cosine to the original, 32 held-out pieces" in result.stdout
    assert "2,048 tokens: dense" in result.stdout
    assert json.loads((out / "report.json").read_text())["settings"]["num_dense_heads"] == 3


def test_rows_kept_for_tests_are_not_looked_at(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(number), "title": "", "text": TEXT if split == "train" else "w1 " * 9_000, "split": split}
        for number, split in enumerate(("train", "test"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    from trilevel.cli.convert import _texts

    assert [len(found) for found in _texts([path])] == [len(TEXT)]


def test_the_built_in_text_is_the_default() -> None:
    from trilevel.cli.convert import _texts

    (found,) = _texts(None)
    assert len(found.split()) >= 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "6:3"], "--ratio 6:3 must be three shares"),
        (["--ratio", "a:b:c"], "must be three shares"),
        (["--ratio", "auto"], "--ratio auto and --max-error go together"),
        (["--max-error", "0.1"], "--ratio auto and --max-error go together"),
        (["--window", "6"], "window=6 must be odd"),
        (["--trained", "some"], "trained='some' is unknown"),
        (["--sha256", "00"], "is asked for"),
    ],
)
def test_wrong_arguments_leave_with_2(
    bert: Path, text: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = call(bert, tmp_path / "out", "--text", text, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short_leaves_with_2(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10.")
    result = call(bert, tmp_path / "out", "--text", path)
    assert result.exit_code == 2
    assert "too few" in result.output
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert call(bert, tmp_path / "out", "--text", empty).exit_code == 2


def test_an_unknown_source_leaves_with_2(tmp_path: Path, text: Path) -> None:
    save(make("bert"), tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    result = call(tmp_path / "pickled", tmp_path / "out", "--text", text)
    assert result.exit_code == 2
    assert "pytorch_model.bin" in result.output


def test_a_loss_above_the_bound_leaves_with_2_and_writes_nothing(bert: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(bert, out, "--text", text, "--steps", 0, "--window", 5, "--max-loss", "0")
    assert result.exit_code == 2
    assert "nothing is written" in result.output
    assert not out.exists()
