"""The state of an optimizer as tensors and JSON types, without pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trilevel.errors import CheckpointError

Plain = dict[str, Any]


def flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], Plain]:
    """Tensors named `INDEX.KEY` (index of the parameter) and what is no tensor, as JSON types."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Plain] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], plain: Plain) -> None:
    """Put back what `flatten_optimizer` gave.

    Raises:
        CheckpointError: the groups, parameters or shapes are those of another model or optimizer.
    """
    current = optimizer.state_dict()["param_groups"]
    groups = plain.get("groups")
    sizes = [len(group["params"]) for group in current]
    if not isinstance(groups, list) or [len(group.get("params", ())) for group in groups] != sizes:
        raise CheckpointError(
            f"the optimizer state is of other parameters: this model's groups have {sizes}. "
            "Resume with the model that wrote it, or start anew (resume=False)."
        )
    state = _state(tensors, plain.get("scalars", {}), _parameters(optimizer))
    # json has made lists of tuples (betas)
    restored = [
        {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in group.items()}
        for group, now in zip(groups, current, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": restored})


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(tensors: dict[str, Tensor], scalars: dict[str, Plain], parameters: list[Tensor]) -> dict[int, Plain]:
    state: dict[int, Plain] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        if not number.isdigit() or not key or int(number) >= len(parameters):
            raise CheckpointError(f"the optimizer state has {name!r}, which is no parameter of this model.")
        wanted = parameters[int(number)].shape
        # a step count is a single number
        if tensor.ndim and tensor.shape != wanted:
            raise CheckpointError(
                f"the optimizer state {name!r} has shape {tuple(tensor.shape)} and its parameter {tuple(wanted)}. "
                "Resume with the model that wrote it."
            )
        # a copy: the loaded tensors look into a mapped file
        state.setdefault(int(number), {})[key] = torch.clone(tensor)
    for number, entry in scalars.items():
        state.setdefault(int(number), {}).update(entry)
    return state
