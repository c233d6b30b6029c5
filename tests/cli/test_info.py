"""`trilevel info`: one document for machines, tables for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import trilevel
from trilevel.attention import library
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
    assert facts["native"] == json.loads(json.dumps(dataclasses.asdict(library.status())))


def test_tables_name_versions_and_extras() -> None:
    output = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"}).output
    for word in (
        "torch",
        "python",
        "attention implementations",
        "native kernels",
        "TRILEVEL_DATA",
        "baselines",
        "documents",
    ):
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


def test_tables_say_why_there_are_no_native_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRILEVEL_ISA", raising=False)
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    (tmp_path / "build.txt").write_text("none: failed at finding a C++ compiler: looked for g++\n")
    output = CliRunner().invoke(app, ["info"], env={"COLUMNS": "400"}).output
    assert "none (impl='native' has no library (failed at finding a C++ compiler: looked for g++)" in output
    assert "python -m trilevel.attention.native.build" in output
    facts = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout.splitlines()[-1])
    assert (facts["native"]["active"], facts["native"]["built"]) == (None, [])


def test_kernels_name_the_active_the_built_and_the_reason() -> None:
    native = {"active": "avx2", "built": ["avx512", "avx2"], "reason": "avx512: not run by this processor."}
    assert info.kernels(native) == "avx2 (avx512: not run by this processor); built: avx512, avx2"
