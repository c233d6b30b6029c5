"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, forward and backward."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.attention.native_process import compiled, emulation_flags, needs_library, run_script
from trilevel.attention import library
from trilevel.attention.native import build

pytestmark = [needs_library, pytest.mark.slow, pytest.mark.timeout(600)]
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1")


def _runtime() -> str:
    """The library that must be loaded before Python is."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    asked = [*compiler, "-print-file-name=libasan.so"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{compiler[0]} has no libasan.so")
    return found


def _flags(isa: str) -> tuple[str, ...]:
    if isa == "amx_emulated":
        return emulation_flags()
    if isa not in build.TARGETS or not library.runs(isa):
        pytest.skip(f"this processor or its system does not run {isa}")
    return build.TARGETS[isa]


@pytest.mark.parametrize("isa", [build.BASELINE, "avx512_bf16", "amx_emulated"])
def test_random_calls(isa: str, tmp_path: Path) -> None:
    flags, runtime = _flags(isa), _runtime()
    path = compiled(tmp_path, isa, *flags, *SANITIZE)
    for threads in ("1", "2"):
        run_script(
            "native_check",
            *("--count", "40", "--seed", threads, "--library", str(path)),
            timeout_s=300,
            LD_PRELOAD=runtime,
            ASAN_OPTIONS="detect_leaks=0",
            OMP_NUM_THREADS=threads,
        )
