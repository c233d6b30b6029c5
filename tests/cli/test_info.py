"""`trilevel info`: one document for machines, tables for people."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
from typer.testing import CliRunner

import trilevel
from trilevel.cli import info
from trilevel.cli.main import app


def test_json_is_one_document_with_every_part() -> None:
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["trilevel"] == trilevel.__version__
    assert {"reference", "blocked"} <= set(facts["implementations"])
    assert facts["machine"]
    assert facts["extras"]["cli"] == []


def test_tables_name_versions_and_extras() -> None:
    output = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"}).output
    for word in ("torch", "python", "attention implementations", "TRILEVEL_DATA", "baselines", "documents"):
        assert word in output


def test_an_extra_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.6", "rich>=1; extra == 'cli'", "absent-package>=2 ; extra == 'cli'", 'rich; extra == "report"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)
    assert info.extras() == {"cli": ["absent-package"], "report": []}


def test_a_source_tree_without_metadata_has_no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert info.extras() == {}
    assert "unknown" in CliRunner().invoke(app, ["info"]).output


def test_tables_say_how_to_get_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["absent-package; extra == 'ray'"])
    output = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"}).output
    assert "lacks absent-package: pip install 'trilevel[ray]'" in output


@pytest.mark.parametrize(
    ("isa", "wanted"),
    [
        (["avx2", "avx512f", "amx_tile", "amx_bf16"], "AVX2 yes, AVX-512 yes, AMX yes, NEON no, bf16 yes"),
        (["asimd"], "AVX2 no, AVX-512 no, AMX no, NEON yes, bf16 no"),
        ([], "AVX2 no, AVX-512 no, AMX no, NEON no, bf16 no"),
    ],
)
def test_instruction_sets_are_named_when_absent_too(isa: list[str], wanted: str) -> None:
    assert info.speeds(isa) == wanted
