"""The root command: what it prints, how fast, and how errors leave it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import trilevel
from trilevel.cli.main import Commands, app
from trilevel.errors import ConfigError


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    lead = f"import sys; sys.path.insert(0, {str(path)!r}); " if path else "import sys; "
    code = f"{lead}sys.argv = ['trilevel', *{list(arguments)!r}]; from trilevel.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def failing(error: BaseException) -> typer.Typer:
    """A command line whose only command raises `error`."""
    broken = typer.Typer(cls=Commands)

    @broken.callback()
    def root() -> None: ...

    @broken.command()
    def go() -> None:
        raise error

    return broken


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"trilevel {trilevel.__version__}"


def test_help_names_every_command_in_order() -> None:
    output = CliRunner().invoke(app, ["--help"]).output
    names = ["demo", "summarize", "convert", "train", "export", "verify", "evaluate", "predict", "bench", "info"]
    places = [output.find(f"│ {name}") for name in names]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize(
    "command",
    [
        ["demo"], ["summarize"], ["convert"], ["train", "documents"], ["train", "classification"],
        ["evaluate", "documents"], ["evaluate", "classification"],
        ["export"], ["verify"], ["predict"], ["bench"], ["bench", "encoders"],
        ["bench", "retrieval"], ["info"],
    ],
)  # fmt: skip
def test_every_command_has_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_help_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys\nfrom trilevel.cli.main import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'matplotlib', 'transformers', 'numpy', 'lightning_fabric'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_our_errors_end_with_a_message_and_exit_code_2() -> None:
    result = CliRunner().invoke(failing(ConfigError("window=4 is even. Use 5.")), ["go"])
    assert result.exit_code == 2
    assert result.stderr == "error: window=4 is even. Use 5.\n"


def test_interrupt_ends_with_one_line_and_exit_code_130() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt()), ["go"])
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


def test_a_command_may_say_what_it_saved_when_interrupted() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt("saved at step 7")), ["go"])
    assert result.exit_code == 130
    assert result.stderr == "saved at step 7\n"


def test_a_defect_of_ours_stays_visible() -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError()), ["go"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_without_the_cli_extra_the_message_names_it(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n")
    result = run("--help", path=tmp_path)
    assert result.returncode == 2
    assert "pip install 'trilevel[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    result = run("info", "--no-such-option")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
