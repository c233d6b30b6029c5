"""Memory counters: they follow what a process really takes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trilevel.applications.documents import memory

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MIB = 2**20


@LINUX
def test_the_peak_rises_with_what_is_taken_and_falls_when_reset() -> None:
    memory.reset_peak()
    before = memory.peak_bytes()
    # a mapping of its own: the heap may hold a freed block of this size that is still resident
    held = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE)
    high = memory.peak_bytes()
    assert before is not None
    assert high is not None
    assert 60 * MIB < high - before < 80 * MIB
    held.close()
    assert memory.peak_bytes() == pytest.approx(high, abs=2 * MIB)
    memory.reset_peak()
    low = memory.peak_bytes()
    assert low is not None
    assert low < high - 50 * MIB


@LINUX
def test_the_peak_of_another_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        found = memory.peak_bytes(child.pid)
        child.communicate(b"\n")
    assert found is not None
    assert found > 0
    assert memory.peak_bytes(child.pid) is None


def test_free_memory_is_part_of_the_machines() -> None:
    free = memory.free_bytes()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("limit", "rest"), [("max", None), (str(100 * MIB), 60 * MIB), (str(10 * MIB), 0), ("nonsense", None)]
)
def test_the_limit_of_the_control_group_counts(tmp_path: Path, limit: str, rest: int | None) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{50 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {10 * MIB}\n")
    assert memory._control_group_rest(tmp_path) == rest


def test_without_a_control_group_nothing_is_known(tmp_path: Path) -> None:
    assert memory._control_group_rest(tmp_path) is None
