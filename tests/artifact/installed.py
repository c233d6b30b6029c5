"""Packages that the development environment lacks, installed once in a folder of the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made whole or not at all; the test is skipped where it cannot be made."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilevel" / "tests"
    base.mkdir(parents=True, exist_ok=True)
    with FileLock(base / f"{name}.lock"):
        folder = base / name
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=base) as made:
                try:
                    make(Path(made) / name)
                except (OSError, subprocess.SubprocessError) as error:
                    pytest.skip(f"{name} cannot be had: {error}")
                shutil.move(Path(made) / name, folder)
    return folder


def run(*command: str, folder: Path | None = None) -> None:
    """Run a command; its last line is the message of the error."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise OSError(f"{command[0]} said {last}")


def environment(name: str, *packages: str) -> Path:
    """The interpreter of an environment with packages and all that they need, made once; else the test is skipped."""

    def make(target: Path) -> None:
        run(sys.executable, "-m", "venv", str(target))
        run(str(target / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages)

    return cached(name, make) / "bin" / "python"


def pip_install(target: Path, packages: Sequence[str], *options: str) -> None:
    """Wheels alone, without what they depend on."""
    fixed = ("--quiet", "--no-deps", "--only-binary=:all:", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *fixed, *options, *packages)
