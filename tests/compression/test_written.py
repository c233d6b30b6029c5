"""Small JSON files: whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trilevel.compression.written import read_json, write_json


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": [1, 2.5, "b"]})
    assert read_json(path) == {"a": [1, 2.5, "b"]}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["", "[1]", "{", "\0"])
def test_what_is_no_table_is_empty(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "none.json") == {}


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
