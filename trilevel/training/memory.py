"""Freed memory that is kept for the next step, where the C library can."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MIB = 1024 * 1024
# parameters of glibc's mallopt
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * _MIB, _MMAP_MAX: 0}
# where glibc's own rule ends in a process that uses large blocks
_USUAL = {_TRIM_THRESHOLD: 64 * _MIB, _TOP_PAD: 128 * 1024, _MMAP_THRESHOLD: 32 * _MIB, _MMAP_MAX: 65_536}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep what is freed, and give it back at the end; elsewhere nothing changes.

    A step frees and allocates the same large tensors as the one before. glibc returns those above 32 MiB to the system,
    which brings them back 4 KiB at a time: with a pretrained encoder on a virtual machine three quarters of a step.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    _set(library, _KEEPING)
    try:
        yield
    finally:
        _set(library, _USUAL)
        library.malloc_trim(0)


def _set(library: ctypes.CDLL, values: dict[int, int]) -> None:
    for parameter, value in values.items():
        library.mallopt(parameter, value)
