"""A model's `config.json`, read value by value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trilevel.errors import CheckpointError, ConfigError

_UNSET: Any = object()
# JSON knows infinity, and integers that no float holds
_ENDLESS = 1e300


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Download the model again.") from error


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read or holds something else.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, not an object. Download the model again.")
    return values


class Settings:
    """Values of a `config.json` with the defaults of their family; a wrong kind of value is a `ConfigError`.

    Args:
        values: what the file holds.
        file: its name, for messages.
    """

    def __init__(self, values: Mapping[str, Any], *, file: str = "config.json") -> None:
        self.values = values
        self.file = file

    def number(self, name: str, default: Any = _UNSET) -> int:
        """An integer; without `default` it must be there."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "an integer")
        return value

    def real(self, name: str, default: float) -> float:
        """A number that is finite and not below 0."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _ENDLESS:
            raise self._wrong(name, value, "a number >= 0")
        return float(value)

    def reals(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """As many numbers as `default` has, from a list or from one for all."""
        value = self._get(name, default)
        many = tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(default)
        if len(many) != len(default) or not all(_is_finite(x) for x in many):
            raise self._wrong(name, value, f"a number or {len(default)}")
        return tuple(map(float, many))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """Height and width, from a list of two or one integer for both."""
        value = self._get(name, default)
        both = value if isinstance(value, (list, tuple)) else (value, value)
        if len(both) != 2 or any(isinstance(x, bool) or not isinstance(x, int) for x in both):
            raise self._wrong(name, value, "an integer or two")
        return both[0], both[1]

    def choice(self, name: str, default: str, known: Mapping[str, Any]) -> Any:
        """What `known` has for a text."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self._wrong(name, value, f"one of {', '.join(known)}")
        return known[value]

    def table(self, name: str) -> Mapping[str, Any]:
        """An object, empty if absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return value or {}

    def refuse(self, name: str, *, unless: Any) -> None:
        """Raise `ConfigError` when a setting says something that this package cannot compute."""
        value = self.values.get(name, unless)
        # absent, null and the empty value all mean the usual thing
        if value and value != unless:
            raise ConfigError(
                f"{self.file} has {name}={value!r}, which is not supported; supported is {unless!r}. Choose a model of "
                "the family without it."
            )

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name, default)
        if value is _UNSET:
            raise ConfigError(f"{self.file} lacks {name!r}, which is needed. Download the model again.")
        return value

    def _wrong(self, name: str, value: Any, needed: str) -> ConfigError:
        return ConfigError(f"{self.file} has {name}={value!r}; {needed} is supported.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
