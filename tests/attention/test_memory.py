"""Advice to the system about large tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trilevel.attention import memory
from trilevel.attention.calibration import FRESH_BYTES
from trilevel.attention.memory import with_huge_pages

SMAPS = Path("/proc/self/smaps")
LARGE = FRESH_BYTES // 4 + 1_009


def is_advised(x: Tensor) -> bool:
    """Whether the mapping that holds the middle of a tensor carries the flag of huge pages."""
    middle = x.data_ptr() + x.numel() * x.element_size() // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= middle < end
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux") or not SMAPS.exists(), reason="huge pages are Linux's")
def test_large_tensors_are_advised_and_small_ones_left_alone() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    large, plain = torch.empty(LARGE), torch.empty(LARGE)
    small = torch.empty(4_099)
    assert with_huge_pages(large) is large
    with_huge_pages(small)
    assert is_advised(large)
    assert not is_advised(plain)
    assert not is_advised(small)


def test_values_and_odd_beginnings_do_not_matter() -> None:
    x = torch.arange(LARGE + 3, dtype=torch.int32)[3:]
    assert torch.equal(with_huge_pages(x), torch.arange(3, LARGE + 3, dtype=torch.int32))


def test_without_the_system_s_help_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    x = torch.zeros(LARGE)
    assert with_huge_pages(x) is x
    meta = torch.empty(LARGE, device="meta")
    assert with_huge_pages(meta) is meta
