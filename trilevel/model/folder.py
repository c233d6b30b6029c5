"""A folder of files that is written whole or not at all, and read only if it is what was written."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trilevel.errors import CheckpointError

CONFIG_FILE = "config.json"
FORMAT = "trilevel-checkpoint"
VERSION = 1
_PIECE = 1 << 20


def write_folder(folder: Path, files: Mapping[str, Callable[[Path], None]], config: Mapping[str, Any]) -> None:
    """Write `files` (name and a function that writes to a path) and `config.json` to `folder`, atomically.

    Everything is written and synced to a temporary folder beside, which then takes the place of `folder`. The old one
    is set aside as `.NAME.previous` between the two renames; `find_folder` looks there, so a crash at any moment
    leaves a whole checkpoint to read.

    Raises:
        CheckpointError: the disk is full, read-only, ...; what was there before is unchanged.
    """
    folder = folder.resolve()
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        _write_files(temporary, files, config)
        _replace(temporary, folder)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {folder} could not be written ({error}); what was there before is unchanged. Free "
            "space or choose another folder, then run again."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    # what a killed writer left; a checkpoint has one writer at a time
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _write_files(temporary: Path, files: Mapping[str, Callable[[Path], None]], config: Mapping[str, Any]) -> None:
    digests = {}
    for name, write in files.items():
        write(temporary / name)
        _sync(temporary / name)
        digests[name] = sha256_of(temporary / name)
    manifest = {"format": FORMAT, "version": VERSION, "files": digests, "config": config}
    (temporary / CONFIG_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(temporary / CONFIG_FILE)
    # mkdtemp makes it private; a checkpoint is as readable as any other file of the user
    temporary.chmod(0o777 & ~_umask())
    _sync(temporary)


def _replace(temporary: Path, folder: Path) -> None:
    # rename cannot replace a folder that holds files, so the old one steps aside; find_folder looks there
    aside = _aside(folder)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    try:
        temporary.rename(folder)
    except OSError:
        if aside.exists():
            aside.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def find_folder(folder: Path) -> Path | None:
    """Where the checkpoint `folder` is: there, or set aside by a write that was cut off; None if nowhere."""
    folder = folder.resolve()
    return next((path for path in (folder, _aside(folder)) if path.exists()), None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `config.json` says, checked for format and version.

    Raises:
        CheckpointError: there is no folder or file, it is no JSON, or of an unknown format or version.
    """
    where = folder / CONFIG_FILE
    _require_inside(folder, where)
    if not where.is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}; it is no trilevel checkpoint, or not all of it was copied."
        )
    try:
        manifest = json.loads(where.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{where} cannot be read ({error}). Copy the checkpoint again or restore it.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{where} does not say format={FORMAT!r}; it is no trilevel checkpoint.")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{where} has format version {manifest.get('version')!r} and this trilevel reads {VERSION}. "
            "Use the trilevel that wrote it, or save it again."
        )
    unknown = sorted(set(manifest) - {"format", "version", "files", "config"})
    if unknown or not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("config"), dict):
        raise CheckpointError(
            f"{where} has unknown keys {unknown}; format, version, files and config are needed and nothing else."
            if unknown
            else f"{where} lacks its files or config table. Restore the checkpoint."
        )
    return manifest


def checked_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> Path:
    """The path of a file that the manifest lists, after its hash has been compared.

    Raises:
        CheckpointError: it is not listed, missing, lies outside the folder, or its hash differs.
    """
    wanted = manifest["files"].get(name)
    if wanted is None:
        raise CheckpointError(f"{folder} holds no {name}; it has {', '.join(sorted(manifest['files'])) or 'no files'}.")
    path = folder / name
    _require_inside(folder, path)
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {name}, which its {CONFIG_FILE} lists. Copy the checkpoint again.")
    found = sha256_of(path)
    if found != wanted:
        raise CheckpointError(
            f"{path} has sha256 {found[:12]}… and {CONFIG_FILE} says {str(wanted)[:12]}…: it was changed or damaged. "
            "Restore the checkpoint."
        )
    return path


def check_names(folder: Path, manifest: Mapping[str, Any], known: set[str]) -> None:
    """Raise `CheckpointError` if the manifest lists a file that no checkpoint has, a path elsewhere above all."""
    unknown = sorted(set(manifest["files"]) - known)
    if unknown:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} lists {', '.join(map(repr, unknown))}; a checkpoint holds "
            f"{', '.join(sorted(known))} and nothing else."
        )


def sha256_of(path: Path) -> str:
    """The hash of a file, read in pieces, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _require_inside(folder: Path, path: Path) -> None:
    if path.resolve().parent != folder.resolve():
        raise CheckpointError(f"{path} leads out of the checkpoint to {path.resolve()}; links are not followed.")


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _sync(path: Path) -> None:
    # folders can be opened for syncing on POSIX only
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # it can only be read by setting it
    mask = os.umask(0)
    os.umask(mask)
    return mask
