"""Noise in training: none, for students of a teacher whose output has none; or blocks that are left out at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


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


@contextmanager
def layer_dropout(blocks: nn.ModuleList, rate: float) -> Iterator[None]:
    """Leave out blocks for some rows of a batch while they train: what comes behind must do without them.

    The chance rises evenly from 0 for the first block to `rate` for the last (LayerSkip, Elhoushi et al. 2024).

    Args:
        blocks: from (batch, ...) to the same shape, in order.
        rate: 0 to below 1.
    """
    chances = [rate * place / max(1, len(blocks) - 1) for place in range(len(blocks))]
    hooks = [
        block.register_forward_hook(partial(_left_out, chance))
        for block, chance in zip(blocks, chances, strict=True)
        if chance > 0
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _left_out(chance: float, block: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
    if not block.training:
        return out
    x: Tensor = given[0]
    is_left_out = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < chance
    return torch.where(is_left_out, x, out)
