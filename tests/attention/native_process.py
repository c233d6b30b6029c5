"""Scripts of the native tests in processes of their own, and libraries compiled for one test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trilevel.attention import library
from trilevel.attention.native import build

ROOT = Path(__file__).parents[2]
# what the emulated AMX library is compiled with, on a processor that has the rest
EMULATED = (*build.AVX512, "-mavx512bf16", "-DTRILEVEL_USE_AMX", "-DTRILEVEL_AMX_EMULATED")
needs_library = pytest.mark.skipif(not library.built(), reason=f"no native library is built: {build.AGAIN}")


def run_script(script: str, *arguments: str, timeout_s: int = 150, **environment: str) -> None:
    """Run a script of this folder; fails with the end of its output. One thread unless told otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRILEVEL_ISA"}
    # threads that wait actively take the processor from other tests
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.attention.{script}", *arguments],
        cwd=ROOT,
        env={**inherited, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-6000:]}"


def compiled(folder: Path, isa: str, *flags: str) -> Path:
    """The kernels compiled with flags of one's own; the test is skipped where that cannot be."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    if unknown := build.unknown_flags(compiler, flags):
        pytest.skip(f"{compiler[0]} does not know {' '.join(unknown)}")
    out = folder / build.library_name(isa)
    error = build.compile_library(compiler, (*build.FLAGS, build.THREADS, *flags), out)
    assert error is None, error
    return out


def emulation_flags() -> tuple[str, ...]:
    """What the emulated AMX library is compiled with; the test is skipped where even that does not run."""
    if not (library.built() and "avx512_bf16" in build.TARGETS and library.runs("avx512_bf16")):
        pytest.skip("this processor has no AVX512-BF16, which the AMX kernels need beside the tiles")
    return EMULATED
