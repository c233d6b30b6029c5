"""`trilevel bench`: the JSON document is the last line, exit codes follow the bars."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trilevel.bench import attention as attention_case
from trilevel.bench.harness import Bar, Report
from trilevel.cli.bench import app
from trilevel.errors import ConfigError


def fake(monkeypatch: pytest.MonkeyPatch, value: float, **more: Any) -> None:
    report = Report(case="attention", rows=[], bars=[Bar(name="b", value=value, op=">=", bar=1)], **more)
    monkeypatch.setattr(attention_case, "run", lambda *_: report)


def test_json_is_the_last_line_and_the_exit_code_is_0_when_bars_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake(monkeypatch, 2.0)
    out = tmp_path / "attention.json"
    result = CliRunner().invoke(app, ["attention", "--json", "--out", str(out)])
    assert result.exit_code == 0
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["bars"] == [{"name": "b", "value": 2.0, "op": ">=", "bar": 1, "holds": True}]
    assert {"machine", "rows", "bars"} <= set(document)
    assert document["machine"]["cores"]
    assert json.loads(out.read_text(encoding="utf-8")) == document


def test_exit_code_is_1_when_a_bar_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, 0.5)
    result = CliRunner().invoke(app, ["attention", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout.splitlines()[-1])["bars"][0]["holds"] is False


def test_exit_code_is_1_when_ours_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, 2.0, broken=["trilevel strict"])
    result = CliRunner().invoke(app, ["attention"])
    assert result.exit_code == 1
    assert "trilevel strict failed its correctness gate" in result.output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smoke_of_the_whole_command() -> None:
    command = [sys.executable, "-m", "trilevel", "bench", "attention", "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["bars"] == []
    assert {row["status"] for row in document["measurements"]} == {"measured"}


@pytest.mark.parametrize("case", ["calibrate", "levels", "listops"])
def test_smoke_of_the_small_cases(case: str) -> None:
    result = CliRunner().invoke(app, [case, "--smoke", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["case"] == case
    assert document["bars"] == []


def test_listops_options_that_do_not_fit_are_refused() -> None:
    unknown = CliRunner().invoke(app, ["listops", "--smoke", "--variant", "remote"])
    assert isinstance(unknown.exception, ConfigError)
    assert "choose from calibrated" in str(unknown.exception)
    odd = CliRunner().invoke(app, ["listops", "--smoke", "--micro-batch", "3"])
    assert isinstance(odd.exception, ConfigError)
    assert "use a divisor" in str(odd.exception)
