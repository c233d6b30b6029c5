"""Means over the tokens of each unit (a sentence, a heading, a span)."""

from __future__ import annotations

import torch
from torch import Tensor

from trilevel.errors import ShapeError


def unit_slots(unit_ids: Tensor, num_units: int, padding_mask: Tensor | None = None) -> Tensor:
    """Where each token is summed, (batch * tokens,): its unit, or one spare slot behind all units.

    Padding and tokens with a negative id go to the spare slot, so that nothing they hold reaches a unit.
    """
    rows = torch.arange(unit_ids.shape[0], device=unit_ids.device)[:, None]
    inside = unit_ids >= 0
    if padding_mask is not None:
        inside = inside & ~padding_mask
    return torch.where(inside, rows * num_units + unit_ids, unit_ids.shape[0] * num_units).flatten()


def sum_by_slot(values: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """Sum `values` (n, ...) into `num_slots` slots, in float32 at least; what falls in the spare slot is dropped."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.new_zeros(num_slots + 1, *wide.shape[1:]).index_add(0, slots, wide)[:num_slots]


def count_units(unit_ids: Tensor) -> int:
    """Units that the largest id asks for, one at least; waits for the device."""
    return max(1, int(unit_ids.max()) + 1) if unit_ids.numel() else 1


def check_unit_ids(x: Tensor, unit_ids: Tensor) -> None:
    """Raise `ShapeError` unless `unit_ids` (batch, tokens) fits `x` (batch, tokens, ...)."""
    if unit_ids.shape != x.shape[:2]:
        raise ShapeError(
            f"unit_ids has shape {tuple(unit_ids.shape)}; (batch, tokens) = {tuple(x.shape[:2])} is needed."
        )


def mean_by_unit(
    x: Tensor, unit_ids: Tensor, *, num_units: int | None = None, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean of the tokens of each unit.

    Args:
        x: (batch, tokens, ...), the values.
        unit_ids: (batch, tokens) int, the unit a token is in; negative for none. Ids need not be sorted.
        num_units: units in the result, above every id; default the largest id + 1, for which the device is waited on.
        padding_mask: (batch, tokens) bool, true at padding, which no unit counts.

    Returns:
        (batch, units, ...) means, zero for a unit without tokens, in the type of `x`, and (batch, units) counts.
    """
    check_unit_ids(x, unit_ids)
    batch = x.shape[0]
    num_units = count_units(unit_ids) if num_units is None else num_units
    slots = unit_slots(unit_ids, num_units, padding_mask)
    counts = sum_by_slot(torch.ones_like(slots, dtype=torch.float32), slots, batch * num_units)
    sums = sum_by_slot(x.flatten(0, 1), slots, batch * num_units)
    weight = counts.clamp(min=1).reciprocal().view(-1, *[1] * (sums.ndim - 1))
    return (sums * weight).to(x.dtype).unflatten(0, (batch, num_units)), counts.view(batch, num_units)
