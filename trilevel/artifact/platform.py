"""What this processor computes integers with, without torch: what answers depend on beside runtime and version."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# the widest first; products of integers are summed differently by each
_WIDEST = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp", "asimd")


_INTEGERS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}


def has_integer_products() -> bool:
    """Whether INT8 is faster than float32 here; without such instructions it is not (decision 0017)."""
    return isa_class() in _INTEGERS


def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16; without such instructions it is no faster than float32."""
    return not _BFLOAT16.isdisjoint(_flags())


def isa_class() -> str:
    """The widest instruction set for products of integers, by Linux's name; elsewhere the machine's name."""
    return next((name for name in _WIDEST if name in _flags()), platform.machine().lower())


@cache
def _flags() -> frozenset[str]:
    """Instruction sets of the processor, by Linux's names; none on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    return frozenset(next((value.split() for name, _, value in lines if name.strip() in ("flags", "Features")), []))
