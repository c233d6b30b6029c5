"""The library of native kernels: which ones are built, which of them this processor runs, and the best one, loaded.

There is a library for each instruction set, built at install when a C++ compiler is there
(`trilevel/attention/native/build.py`). The best that this processor runs is loaded on first use; the environment
variable `TRILEVEL_ISA` names another. A name that cannot be had raises, it is never replaced.

Nothing here imports torch, for runtimes that do without. Whoever uses both imports torch first: it brings libgomp, and
two of them would be two pools of threads.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import RLock

from trilevel.attention.native import build
from trilevel.errors import ImplementationError

ABI_VERSION = 2
FOLDER = build.LIB
_LOCK = RLock()


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """What `trilevel info` says about the native kernels: `active` is None when none can be used, `reason` says why."""

    active: str | None
    built: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class _Choice:
    library: ctypes.CDLL
    isa: str
    status: NativeStatus

    @staticmethod
    def of(isa: str, reason: str) -> _Choice:
        return _Choice(load(_path(isa)), isa, NativeStatus(isa, built(), reason))


def library() -> ctypes.CDLL:
    """The library of the active instruction set; loaded once, safe to call from any thread.

    Raises:
        ImplementationError: none is built, or `TRILEVEL_ISA` names one that is unknown, not built or not run here.
    """
    return _choice().library


def library_path() -> Path:
    """The file of `library`, which is also a library of operators for ONNX Runtime; raises as it does."""
    return _path(active_isa())


def active_isa() -> str:
    """The name of the active instruction set, one of `native.build.TARGETS`; raises as `library` does."""
    return _choice().isa


def is_available() -> bool:
    """Whether `library` would return one."""
    return status().active is not None


def status() -> NativeStatus:
    """The active instruction set, those that are built, and the reason for both; never raises."""
    try:
        choice = _choice()
    except ImplementationError as error:
        return NativeStatus(None, built(), str(error))
    return choice.status


def built() -> tuple[str, ...]:
    """The instruction sets whose library lies in the folder, best first."""
    return tuple(isa for isa in build.TARGETS if _path(isa).exists())


def runs(isa: str) -> bool:
    """Whether this processor and kernel run an instruction set, as the library that every processor runs tells."""
    if isa == build.BASELINE:
        return True
    return _path(build.BASELINE).exists() and bool(load(_path(build.BASELINE)).trilevel_supports(isa.encode()))


@cache
def load(path: Path) -> ctypes.CDLL:
    """Load one library and declare its functions; structures are passed as pointers.

    Raises:
        ImplementationError: it cannot be loaded or was built from other sources than this package's.
    """
    try:
        loaded = ctypes.CDLL(str(path))
        version = loaded.trilevel_abi_version()
    except (OSError, AttributeError) as error:
        raise ImplementationError(f"{path.name} cannot be loaded ({error}). Build it anew: {build.AGAIN}.") from error
    if version != ABI_VERSION:
        raise ImplementationError(
            f"{path.name} has interface {version}, this trilevel needs {ABI_VERSION}. Build it anew: {build.AGAIN}."
        )
    loaded.trilevel_error.restype = c_char_p
    loaded.trilevel_supports.argtypes = [c_char_p]
    loaded.trilevel_forward.argtypes = [c_void_p]
    loaded.trilevel_backward.argtypes = [c_void_p, c_void_p]
    loaded.trilevel_set_threads.argtypes, loaded.trilevel_set_threads.restype = [c_int32], None
    for function in (loaded.trilevel_forward, loaded.trilevel_backward, loaded.trilevel_supports):
        function.restype = c_int32
    return loaded


_choices: dict[tuple[str | None, Path], _Choice] = {}


def _choice() -> _Choice:
    key = (os.environ.get("TRILEVEL_ISA") or None, FOLDER)
    found = _choices.get(key)
    if found is None:
        with _LOCK:
            found = _choices.get(key) or (_named(key[0]) if key[0] else _best())
            _choices[key] = found
    return found


def _best() -> _Choice:
    there = built()
    if not there:
        raise ImplementationError(
            f"impl='native' has no library ({_record()}). Install a C++ compiler (Debian, Ubuntu: apt install g++) and "
            f"run: {build.AGAIN}; or use impl='auto', which needs none."
        )
    chosen = next((isa for isa in there if runs(isa)), None)
    if chosen is None:
        raise ImplementationError(
            f"impl='native' has libraries for {', '.join(there)}, and this processor runs none of them. Build the one "
            f"for {build.BASELINE}: {build.AGAIN}; or use impl='auto'."
        )
    return _Choice.of(chosen, _why(chosen))


def _why(chosen: str) -> str:
    """What keeps each better instruction set from being the active one, and from running threads."""
    there, better = built(), list(build.TARGETS)[: list(build.TARGETS).index(chosen)]
    notes = [f"{isa}: {'not run by this processor or its system' if isa in there else _record(isa)}" for isa in better]
    if threads := build.read_record(FOLDER).get("threads"):
        notes.append(f"threads: {threads}")
    return "; ".join(notes) or "the best of this kind of processor"


def _named(name: str) -> _Choice:
    isa = build.BASELINE if name == "portable" else name
    usable = ", ".join(other for other in built() if runs(other)) or "none"
    advice = f"These work here: {usable}. Name one of them, or unset TRILEVEL_ISA to take the best"
    if isa not in build.TARGETS:
        raise ImplementationError(f"TRILEVEL_ISA={name!r} is not known for this kind of processor. {advice}.")
    if isa not in built():
        raise ImplementationError(f"TRILEVEL_ISA={name!r} is not built ({_record(isa)}). {advice}, or {build.AGAIN}.")
    if not runs(isa):
        raise ImplementationError(f"TRILEVEL_ISA={name!r} is not run by this processor or its system. {advice}.")
    return _Choice.of(isa, f"named by TRILEVEL_ISA={name}")


def _path(isa: str) -> Path:
    return FOLDER / build.library_name(isa)


def _record(isa: str | None = None) -> str:
    """What build.txt says of an instruction set, or of the whole build."""
    lines = build.read_record(FOLDER)
    if not lines:
        return "it was never built"
    if isa in lines:
        return lines[isa]
    return lines.get("none") or "; ".join(f"{name}: {state}" for name, state in lines.items())
