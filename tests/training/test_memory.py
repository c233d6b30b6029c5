"""Freed memory is kept during training, and given back at its end."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from trilevel.training.memory import freed_memory_kept

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc alone"
)
MIB = 1024 * 1024


def faults(mib: int) -> int:
    """Pages that the system had to bring for a tensor that was freed before."""
    import resource

    torch.ones(mib * MIB // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mib * MIB // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_large_tensors_come_from_what_was_freed() -> None:
    outside = faults(160)
    with freed_memory_kept():
        inside = faults(160)
    # huge pages bring 512 at once
    assert inside < max(40, outside / 4)
    assert faults(160) > 2 * inside + 40


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="stopped"), freed_memory_kept():
        raise ValueError("stopped")
    assert faults(160) > 40
