"""Recipe files: TOML whose tables are known by name."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trilevel.errors import ConfigError


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
