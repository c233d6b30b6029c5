"""The machine block goes to JSON and names what a reader needs."""

from __future__ import annotations

import json

import pytest
import torch

from trilevel.report import machine


def test_block_is_json_and_complete() -> None:
    block = machine.machine_block()
    assert json.loads(json.dumps(block)) == block
    wanted = {
        "cpu",
        "isa",
        "cores",
        "threads",
        "memory_bytes",
        "gpu",
        "system",
        "python",
        "torch",
        "versions",
        "commit",
    }
    assert set(block) == wanted | {"versions", "commit"}
    assert block["threads"] == torch.get_num_threads()
    assert block["torch"] == torch.__version__


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr("subprocess.run", missing)
    assert machine.machine_block()["commit"] is None


def test_another_system_still_gives_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> str:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert isinstance(machine.machine_block()["isa"], list)
