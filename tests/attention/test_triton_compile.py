"""The kernels compile for an H100, which needs no GPU: what the interpreter accepts the compiler may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attention.cases import __file__ as here

pytest.importorskip("triton", reason="triton is not installed: pip install 'trilevel[gpu]'")

EVERY_KIND = [
    f"{kind}:{dtype}:64"
    for kind in ("window", "local", "local_causal", "regional", "global", "packed", "union_causal")
    for dtype in ("bf16", "fp16", "fp32")
]


def compile_for_h100(kinds: list[str], cache: Path) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.triton_compile", *kinds],
        env={**environment, "TRITON_CACHE_DIR": str(cache)}, cwd=Path(here).parents[2], check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return len(done.stdout.splitlines())


def test_every_kernel_with_everything_it_can_see(tmp_path: Path) -> None:
    assert compile_for_h100(["union_causal:bf16:64"], tmp_path) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [*EVERY_KIND, *(f"union_causal:{dtype}:256" for dtype in ("bf16", "fp32"))])
def test_every_kind(kind: str, tmp_path: Path) -> None:
    assert compile_for_h100([kind], tmp_path) >= 3
