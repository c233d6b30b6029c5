"""The machine block: on what a number was measured. Every result file carries one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_ISA_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
_PACKAGES = ("torch", "numpy", "tokenizers", "transformers", "sumy", "rouge-score")


def machine_block() -> dict[str, Any]:
    """CPU model, ISA flags, cores, memory, threads, GPU, versions and commit, ready for JSON.

    What cannot be found out on a system is `None` or an empty list.
    """
    cpu = _cpu_info()
    return {
        "cpu": cpu["model"],
        "isa": cpu["isa"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def _cpu_info() -> dict[str, Any]:
    model, flags = platform.processor() or None, set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        # not Linux: torch still knows the widest vector set
        flags = {torch.backends.cpu.get_cpu_capability().lower()}
    return {"model": model, "isa": [flag for flag in _ISA_FLAGS if flag in flags]}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the working tree, with `+` behind it when tracked files are changed."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
