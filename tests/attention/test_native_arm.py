"""The native kernels on ARM: compiled for aarch64, run by its emulator, outputs and gradients against the reference.

No aarch64 build of torch runs there, so a small program (native_driver.cpp) reads calls from a file, runs them through
the C interface and writes the results. The same program runs on this machine's processor too.
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.native_cases import Problem, differences, drawn, results
from trilevel.attention.api import validated
from trilevel.attention.call import Call
from trilevel.attention.native import build

pytestmark = [pytest.mark.arm, pytest.mark.timeout(300)]
DRIVER = Path(__file__).parent / "native_driver.cpp"
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
OPTIONAL = ("pool_weight", "score", "forced", "valid", "segment")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
THREADS = 2


def call_of(problem: Problem) -> Call:
    absent: dict[str, Any] = dict.fromkeys(("global_prior", "region_gate", "num_segments"))
    return validated(**problem.arguments, **absent, return_lse=True)


def packed(problem: Problem, call: Call) -> bytes:
    """The call as native_driver.cpp reads it."""
    levels = call.levels
    # no gradient arrives where a row sees nothing
    grad_lse = torch.where(results(problem, "reference")["lse"].isfinite(), problem.grad_lse, 0)
    fields = [
        *(call.query.shape[0], call.query.shape[1], call.key.shape[1], call.query.shape[2], call.query.shape[3]),
        *(DTYPES[call.query.dtype], *call.split, levels.radius, levels.region_size or 0, levels.num_regions or 0),
        *(levels.num_global_tokens, levels.num_sinks, min(levels.chunk, call.query.shape[2] + 1), levels.union),
        *(levels.selection_gradient == "gate", call.is_causal, THREADS),
        *(getattr(call, name) is not None for name in OPTIONAL),
    ]
    kinds = (torch.float32, torch.float32, torch.bool, torch.bool, torch.int64)
    optional = [
        getattr(call, name).to(kind)
        for name, kind in zip(OPTIONAL, kinds, strict=True)
        if getattr(call, name) is not None
    ]
    tensors = [call.query, call.key, call.value, problem.grad_out, grad_lse, *optional]
    header = struct.pack(f"={len(fields)}qd", *(int(field) for field in fields), call.scale)
    return header + b"".join(raw(x) for x in tensors)


def raw(x: Tensor) -> bytes:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def unpacked(data: bytearray, call: Call) -> dict[str, Tensor]:
    """Take the results of one call from the front of what the driver wrote."""
    found = {}
    shapes = {"out": (call.query.shape, call.query.dtype), "lse": (call.query.shape[:3], torch.float32)}
    given: dict[str, Tensor | None] = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "pool_weight": call.pool_weight,
    }
    given["global_score"] = call.score
    shapes |= {name: (x.shape, torch.float32) for name, x in given.items() if x is not None}
    for name, (shape, dtype) in shapes.items():
        size = shape.numel() * dtype.itemsize
        found[name] = torch.frombuffer(data[:size], dtype=dtype).view(shape)
        del data[:size]
    return found


def compiled(compiler: list[str], folder: Path, *flags: str) -> Path:
    """The driver with the kernels in it."""
    program = folder / "native_driver"
    wanted = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    sources = [str(DRIVER), str(build.SOURCES / "kernels.cpp")]
    command = [*compiler, *wanted, build.THREADS, *flags, "-I", str(build.SOURCES), *sources, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def assert_agrees(run: list[str], folder: Path, count: int) -> None:
    """Run calls through the driver and hold the results against the reference."""
    problems = [(problem, call_of(problem)) for problem in drawn(count, 11)]
    calls, written = folder / "calls", folder / "results"
    calls.write_bytes(b"".join(packed(problem, call) for problem, call in problems))
    done = subprocess.run([*run, str(calls), str(written)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    data = bytearray(written.read_bytes())
    told = []
    for problem, call in problems:
        found = unpacked(data, call)
        if problem.arguments["global_score"] is None:
            # zeros stand for it
            found.pop("global_score", None)
        told += [f"{line}: {problem.name}" for line in differences(problem, found)]
    assert not data
    assert not told, "\n".join(told)


def test_emulated_aarch64(tmp_path: Path) -> None:
    if IS_ARM:
        pytest.skip("this machine is one; the test below runs on it")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64: apt install g++-aarch64-linux-gnu qemu-user")
    assert_agrees([emulator, str(compiled([compiler], tmp_path, "-static"))], tmp_path, 30)


def test_this_machine(tmp_path: Path) -> None:
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    assert_agrees([str(compiled(compiler, tmp_path))], tmp_path, 120)
