"""The native kernels touch nothing outside the tensors they are given."""

from __future__ import annotations

import sys

import pytest

from tests.attention.native_process import needs_library, run_script

pytestmark = [
    needs_library,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages by Linux's mmap and mprotect"),
]


def test_calls_between_guard_pages() -> None:
    run_script("native_guards")


def test_the_pages_guard() -> None:
    with pytest.raises(AssertionError, match="exit status -"):
        run_script("native_guards", "--fault")
