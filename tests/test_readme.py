"""What the README shows runs as shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from typer.core import TyperGroup
from typer.main import get_command

from trilevel.cli.main import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs() -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    code = f"import torch; torch.set_num_threads(1)\n{example}\nassert y.shape == x.shape"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_every_command_shown_exists() -> None:
    shown = set(re.findall(r"^trilevel (\w+)", README, flags=re.MULTILINE))
    assert {"summarize", "train", "evaluate", "bench", "info"} <= shown
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    assert shown <= set(root.commands)


def test_the_two_commands_stand_in_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen
    assert "make test" in first_screen
