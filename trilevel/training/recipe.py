"""Recipe files: TOML whose tables are known by name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trilevel.errors import ConfigError
from trilevel.model.config import from_mapping
from trilevel.training.config import TrainConfig


def read_tables(path: str | Path, known: Sequence[str], *, option: str = "--recipe") -> dict[str, Any]:
    """The tables of a TOML file by name, as `from_mapping` takes them.

    Args:
        path: of the file.
        known: names that a table may have.
        option: of the command line that names such a file.

    Raises:
        ConfigError: the file is missing or no TOML, or has a table of another name.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: no recipe there ({error.strerror}). Name a TOML file with {option}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error}).") from error
    unknown = sorted(set(values) - set(known))
    if unknown:
        names = f"{', '.join(known[:-1])} and {known[-1]}"
        raise ConfigError(f"{path}: unknown table {', '.join(unknown)}; known are {names}.")
    return values


def train_config(base: TrainConfig, table: Mapping[str, Any], path: str | Path) -> TrainConfig:
    """`base` with what the table `train` changes; steps and warm-up follow from the table `schedule`.

    Raises:
        ConfigError: a key is unknown or follows from the schedule, or a value is out of range.
    """
    derived = sorted({"steps", "warmup_steps"} & set(table))
    if derived:
        raise ConfigError(f"{path}: train.{derived[0]} follows from the table schedule; write it there.")
    values = {name: getattr(base, name) for name in TrainConfig.__dataclass_fields__} | dict(table)
    betas = values["betas"]
    if not isinstance(betas, (list, tuple)) or len(betas) != len(base.betas):
        raise ConfigError(f"{path}: train.betas={betas!r} must be two numbers, such as {list(base.betas)}.")
    return from_mapping(TrainConfig, values | {"betas": tuple(betas)})
