"""Every instruction set that runs here gives what the reference gives, outputs and gradients alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attention.native_process import compiled, emulation_flags, needs_library, run_script
from trilevel.attention import library
from trilevel.attention.native import build

pytestmark = needs_library


def _skip_unless_it_runs(isa: str) -> None:
    if isa not in library.built():
        pytest.skip(f"{isa} is not built here")
    if not library.runs(isa):
        pytest.skip(f"this processor or its system does not run {isa}")


@pytest.mark.parametrize("isa", build.TARGETS)
def test_random_calls(isa: str) -> None:
    _skip_unless_it_runs(isa)
    run_script("native_check", "--count", "60", TRILEVEL_ISA=isa)


def test_the_number_of_threads_changes_no_bit() -> None:
    run_script("native_check", "--count", "15", "--seed", "1", "--threads")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("isa", build.TARGETS)
def test_many_calls(isa: str) -> None:
    _skip_unless_it_runs(isa)
    run_script("native_check", "--count", "400", "--seed", "2", "--named", timeout_s=500, TRILEVEL_ISA=isa)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tiles_in_software(tmp_path: Path) -> None:
    """The code for AMX, where no processor has it: the tile instructions are emulated."""
    path = compiled(tmp_path, "amx_emulated", *emulation_flags())
    run_script("native_check", "--count", "120", "--named", "--bfloat16", "--library", str(path))
