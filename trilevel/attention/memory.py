"""Memory for large results: one page fault for 2 MiB where Linux gives huge pages on request, not one for each 4 KiB.

New memory comes from the system page by page; for an output of 128 MiB that took half of a window's time (decision
0009).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

from trilevel.attention.calibration import FRESH_BYTES


def with_huge_pages(x: Tensor) -> Tensor:
    """The tensor, which has not been written yet; advice to the system, without effect on values.

    Tensors below `FRESH_BYTES` are left alone: their memory was used before and will be used again.
    """
    size = x.numel() * x.element_size()
    if size < FRESH_BYTES or x.device.type != "cpu":
        return x
    advise = _madvise()
    if advise is not None:
        # whole pages of the tensor's own; a refusal only leaves pages small
        first = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (x.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return x


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
