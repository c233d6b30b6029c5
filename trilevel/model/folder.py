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
from typing import Any, NamedTuple

from trilevel.errors import CheckpointError, TrilevelError

CONFIG_FILE = "config.json"
_PIECE = 1 << 20
# stands for the hash of a manifest while that is computed
_UNSEALED = "0" * 64


class Kind(NamedTuple):
    """What a folder is: its noun in messages, what its manifest says of the format, the manifest's name, its error.

    `is_sealed`: the manifest holds a hash of itself, so that no byte of it can change unseen.
    """

    noun: str
    format: str
    version: int
    manifest: str
    error: type[TrilevelError]
    is_sealed: bool = False


CHECKPOINT = Kind("checkpoint", "trilevel-checkpoint", 1, CONFIG_FILE, CheckpointError)


def write_folder(
    folder: Path,
    files: Mapping[str, Callable[[Path], None]],
    config: Mapping[str, Any],
    kind: Kind = CHECKPOINT,
) -> None:
    """Write `files` (name and a function that writes to a path) and the manifest to `folder`, atomically.

    Everything is written and synced to a temporary folder beside, which then takes the place of `folder`. The old one
    is set aside as `.NAME.previous` between the two renames; `find_folder` looks there, so a crash at any moment
    leaves a whole folder to read.

    Raises:
        CheckpointError (or that of `kind`): the disk is full, read-only, ...; what was there before is unchanged.
    """
    folder = folder.resolve()
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        _write_files(temporary, files, config, kind)
        _replace(temporary, folder)
    except OSError as error:
        raise kind.error(
            f"the {kind.noun} {folder} could not be written ({error}); what was there before is unchanged. Free "
            "space or choose another folder, then run again."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    # what a killed writer left; a folder has one writer at a time
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _write_files(
    temporary: Path, files: Mapping[str, Callable[[Path], None]], config: Mapping[str, Any], kind: Kind
) -> None:
    digests = {}
    for name, write in files.items():
        write(temporary / name)
        _sync(temporary / name)
        digests[name] = sha256_of(temporary / name)
    manifest = {"format": kind.format, "version": kind.version, "files": digests, "config": config}
    if kind.is_sealed:
        manifest["sha256"] = _UNSEALED
    text = json.dumps(manifest, indent=2) + "\n"
    if kind.is_sealed:
        text = text.replace(_UNSEALED, _seal(text))
    (temporary / kind.manifest).write_text(text, encoding="utf-8")
    _sync(temporary / kind.manifest)
    # mkdtemp makes it private; what is written is as readable as any other file of the user
    temporary.chmod(0o777 & ~_umask())
    _sync(temporary)


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    """Where `folder` is: there, or set aside by a write that was cut off; None if nowhere."""
    folder = folder.resolve()
    return next((path for path in (folder, _aside(folder)) if path.exists()), None)


def read_manifest(folder: Path, kind: Kind = CHECKPOINT) -> dict[str, Any]:
    """What the manifest says, checked for format and version.

    Raises:
        CheckpointError (or that of `kind`): there is no folder or file, it is no JSON, of an unknown format or version,
            or changed since.
    """
    where = folder / kind.manifest
    _require_inside(folder, where, kind)
    if not where.is_file():
        raise kind.error(
            f"{folder} has no {kind.manifest}; it is no trilevel {kind.noun}, or not all of it was copied."
        )
    try:
        text = where.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (ValueError, OSError) as error:
        raise kind.error(f"{where} cannot be read ({error}). Copy the {kind.noun} again or restore it.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != kind.format:
        raise kind.error(f"{where} does not say format={kind.format!r}; it is no trilevel {kind.noun}.")
    if manifest.get("version") != kind.version:
        raise kind.error(
            f"{where} has format version {manifest.get('version')!r} and this trilevel reads {kind.version}. "
            "Use the trilevel that wrote it, or save it again."
        )
    if kind.is_sealed:
        seal = str(manifest.pop("sha256", None))
        if _seal(text.replace(seal, _UNSEALED)) != seal:
            raise kind.error(f"{where} was changed or damaged: it does not have the hash it says. {_restore(kind)}")
    unknown = sorted(set(manifest) - {"format", "version", "files", "config"})
    if unknown or not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("config"), dict):
        raise kind.error(
            f"{where} has unknown keys {unknown}; format, version, files and config are needed and nothing else."
            if unknown
            else f"{where} lacks its files or config table. {_restore(kind)}"
        )
    return manifest


def _restore(kind: Kind) -> str:
    return f"Restore the {kind.noun}."


def checked_file(folder: Path, name: str, manifest: Mapping[str, Any], kind: Kind = CHECKPOINT) -> Path:
    """The path of a file that the manifest lists, after its hash has been compared.

    Raises:
        CheckpointError (or that of `kind`): it is not listed, missing, lies outside the folder, or its hash differs.
    """
    wanted = manifest["files"].get(name)
    if wanted is None:
        raise kind.error(f"{folder} holds no {name}; it has {', '.join(sorted(manifest['files'])) or 'no files'}.")
    path = folder / name
    _require_inside(folder, path, kind)
    if not path.is_file():
        raise kind.error(f"{folder} lacks {name}, which its {kind.manifest} lists. Copy the {kind.noun} again.")
    found = sha256_of(path)
    if found != wanted:
        raise kind.error(
            f"{path} has sha256 {found[:12]}… and {kind.manifest} says {str(wanted)[:12]}…: it was changed or damaged. "
            f"{_restore(kind)}"
        )
    return path


def check_names(folder: Path, manifest: Mapping[str, Any], known: set[str], kind: Kind = CHECKPOINT) -> None:
    """Raise the error of `kind` if the manifest lists a file that no such folder has, a path elsewhere above all."""
    unknown = sorted(set(manifest["files"]) - known)
    if unknown:
        raise kind.error(
            f"{folder / kind.manifest} lists {', '.join(map(repr, unknown))}; a {kind.noun} holds "
            f"{', '.join(sorted(known))} and nothing else."
        )


def sha256_of(path: Path) -> str:
    """The hash of a file, read in pieces, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _require_inside(folder: Path, path: Path, kind: Kind) -> None:
    if path.resolve().parent != folder.resolve():
        raise kind.error(f"{path} leads out of the {kind.noun} to {path.resolve()}; links are not followed.")


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
