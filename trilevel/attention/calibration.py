"""How long this machine takes for each kind of work: fitted by `trilevel bench calibrate`, kept in the user's cache.

A calibration belongs to one processor, instruction set of the native kernels, number of threads, torch and trilevel;
its file is named after them. A file that is damaged or belongs to something else is passed over with one line in the
log, and predictions use the shipped values.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

import trilevel
from trilevel.attention import library
from trilevel.errors import InputError

FORM = 1
"""Of the file; a file of another form is passed over."""
Key = tuple[str, str]
"""Implementation and name of the torch type."""
_log = logging.getLogger(__name__)


class Work(NamedTuple):
    """Amounts of each kind of work in a forward call, or nanoseconds that a unit of each kind takes.

    Args:
        calls: 1.
        classes: classes of heads that torch's operators compute one after the other.
        heads: KV heads whose windows `blocked` computes one after the other (`strict` local ones).
        bytes_: queries, keys, values and outputs.
        fresh: the output's, when it is so large that each call gets new memory from the system.
        near: (query, key) pairs inside windows.
        tail: all other (query, entry) pairs.
        products: head_dim * (near + tail).
        folded: features of queries with a calibrated head, whose other tokens are folded into entries.
        pooled: bytes of the heads that torch pools, gathers or scatters (`strict` regional and global).
    """

    calls: float
    classes: float
    heads: float
    bytes_: float
    fresh: float
    near: float
    tail: float
    products: float
    folded: float
    pooled: float


FRESH_BYTES = 32 * 2**20
"""The most that glibc's malloc keeps for the next call; more is mapped and zeroed by the system each time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Nanoseconds a unit of each kind of work takes, by implementation and type. Compared and hashed by identity.

    Args:
        machine: what it was measured on, as `this_machine` gives it.
        rates: nanoseconds, all finite and >= 0.
    """

    machine: Mapping[str, str]
    rates: Mapping[Key, Work]

    def predicted_ms(self, key: Key, work: Work) -> float | None:
        """Milliseconds of some work; None when the implementation and type were not measured."""
        rates = self.rates.get(key)
        return None if rates is None else 1e-6 * sum(a * b for a, b in zip(rates, work, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file."""
        rates = [
            {"impl": impl, "dtype": dtype, "nanoseconds": work._asdict()} for (impl, dtype), work in self.rates.items()
        ]
        return {"form": FORM, "machine": dict(self.machine), "rates": rates}

    @staticmethod
    def of(document: Any) -> Calibration:
        """From a file's document.

        Raises:
            ValueError: it has another form or other kinds of work, or numbers that are no rates.
        """
        if not isinstance(document, dict) or document.get("form") != FORM:
            raise ValueError(f"no document of form {FORM}")
        try:
            machine = {str(name): str(value) for name, value in document["machine"].items()}
            rates = {
                (str(entry["impl"]), str(entry["dtype"])): _rates(entry["nanoseconds"]) for entry in document["rates"]
            }
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return Calibration(machine=machine, rates=rates)


def _rates(given: Mapping[str, Any]) -> Work:
    rates = Work(**{kind: float(value) for kind, value in given.items()})
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ValueError(f"a rate is negative or not finite: {given}")
    return rates


def this_machine() -> dict[str, str]:
    """What a calibration depends on: processor, instruction set, threads, torch and trilevel."""
    return {
        "cpu": _cpu(),
        "isa": library.status().active or "none",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "trilevel": trilevel.__version__,
    }


@cache
def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def folder() -> Path:
    """`XDG_CACHE_HOME`, else `~/.cache`, and in it `trilevel`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilevel"


def path_of(machine: Mapping[str, str]) -> Path:
    """The file of a machine's calibration."""
    digest = hashlib.sha256(json.dumps(dict(machine), sort_keys=True).encode()).hexdigest()
    return folder() / f"cost-{digest[:16]}.json"


def store(calibration: Calibration) -> Path:
    """Write the file atomically (temporary file, fsync, rename); predictions of this process use it at once.

    Raises:
        InputError: the folder cannot be written.
    """
    path = path_of(calibration.machine)
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(calibration.to_dict(), file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except (OSError, ValueError) as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error}). Name a writable folder in XDG_CACHE_HOME.") from error
    forget()
    return path


def load(machine: Mapping[str, str]) -> Calibration | None:
    """The stored calibration of a machine, None when there is none that can be used."""
    path = path_of(machine)
    try:
        found = Calibration.of(json.loads(path.read_text(encoding="utf-8")))
        if found.machine != dict(machine):
            raise ValueError(f"measured on {dict(found.machine)}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("%s is passed over (%s); `trilevel bench calibrate` writes it anew", path, error)
        return None
    return found


_loaded: dict[tuple[int, str | None], Calibration | None] = {}


def current() -> Calibration | None:
    """The calibration of this machine with the threads torch has now; the file is read once a process."""
    key = (torch.get_num_threads(), library.status().active)
    if key not in _loaded:
        _loaded[key] = load(this_machine())
    return _loaded[key]


def forget() -> None:
    """Read the file again on next use."""
    _loaded.clear()
