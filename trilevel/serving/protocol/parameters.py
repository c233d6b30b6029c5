"""What a request says beside its tensors, in the protocol's `parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trilevel.errors import InputError

_TIMEOUT_US = 86_400_000_000
_KNOWN = ("priority", "max_loss", "explain", "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """As in `Request`; `timeout_s` from when the request came."""

    priority: int = 0
    max_loss: float | None = None
    is_explained: bool = False
    timeout_s: float | None = None


_NONE = Parameters()


def read_parameters(given: Mapping[str, object]) -> Parameters:
    """The parameters of a request: `priority` (larger first), `max_loss`, `explain`, and `timeout` in microseconds.

    An unknown one is refused: whoever misspells `max_loss` must not believe that it holds.

    Raises:
        InputError: one is unknown, of another type or out of range.
    """
    if not given:
        return _NONE
    for name in given:
        if name not in _KNOWN:
            raise InputError(f"parameter {name[:80]!r} is none of {', '.join(_KNOWN)}.")
    timeout = _whole(given, "timeout", 1, _TIMEOUT_US)
    return Parameters(
        priority=_whole(given, "priority", -1000, 1000) or 0,
        max_loss=_share(given),
        is_explained=_truth(given, "explain"),
        timeout_s=None if timeout is None else timeout / 1e6,
    )


def _whole(given: Mapping[str, object], name: str, low: int, high: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise InputError(f"parameter {name} must be a whole number from {low} to {high}.")
    return value


def _share(given: Mapping[str, object]) -> float | None:
    value = given.get("max_loss")
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise InputError("parameter max_loss must be a number of 0 or more.")
    return float(value)  # type: ignore[arg-type]


def _truth(given: Mapping[str, object], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"parameter {name} must be true or false.")
    return value
