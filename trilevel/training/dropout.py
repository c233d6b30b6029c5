"""Training without noise, for students of a teacher whose output has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The teacher's output is without noise, so the student learns without; what was set is set again afterwards."""
    rates = {part: part.p for part in model.modules() if isinstance(part, nn.Dropout)}
    try:
        for part in rates:
            part.p = 0.0
        yield
    finally:
        for part, rate in rates.items():
            part.p = rate
