"""Weights from one model to another that differs in a few parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trilevel.errors import ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """Names of the parameters and buffers that were copied, and of those that only one of the models has."""

    copied: tuple[str, ...]
    only_in_source: tuple[str, ...]
    only_in_target: tuple[str, ...]


def copy_shared(source: nn.Module, target: nn.Module) -> CopyReport:
    """Copy every parameter and buffer that both models have, by name, into `target`; the others are left alone.

    Raises:
        ShapeError: a name that both have has two shapes; nothing is copied then.
    """
    given, wanted = source.state_dict(), target.state_dict()
    shared = [name for name in wanted if name in given]
    for name in shared:
        if given[name].shape != wanted[name].shape:
            raise ShapeError(
                f"{name} has shape {tuple(given[name].shape)} in the source and {tuple(wanted[name].shape)} in the "
                "target. Build both models with the same sizes."
            )
    with torch.no_grad():
        for name in shared:
            wanted[name].copy_(given[name])
    return CopyReport(
        copied=tuple(shared),
        only_in_source=tuple(name for name in given if name not in wanted),
        only_in_target=tuple(name for name in wanted if name not in given),
    )
