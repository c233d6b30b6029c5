"""Any encoder by name or folder: what `trilevel convert` wrote, or a pretrained one."""

from __future__ import annotations

from pathlib import Path

from trilevel.conversion.converted import is_converted, read_converted
from trilevel.conversion.source import Source, load_source


def load_encoder(name_or_path: str | Path) -> Source:
    """An encoder with its tokenizer and settings; a converted one has levels, a pretrained one is dense.

    Args:
        name_or_path: a folder of `trilevel convert`, or whatever `load_source` takes.

    Raises:
        CheckpointError, ConfigError, MissingExtraError: as `read_converted` and `load_source` do.
    """
    path = Path(name_or_path).expanduser()
    return read_converted(path) if is_converted(path) else load_source(name_or_path)
