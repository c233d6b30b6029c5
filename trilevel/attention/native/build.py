"""Build the native kernels: one shared library for each instruction set that the compiler knows.

    python -m trilevel.attention.native.build

`pip install` runs this through setup.py and `make` runs it by its path, hence the standard library alone. A compiler
that is missing or fails leaves a package that works without these kernels; `lib/build.txt` keeps what happened, for
`trilevel info`. `CXX` names the compiler. `TRILEVEL_BUILD=0` builds nothing and removes what was built,
`TRILEVEL_BUILD=require` makes a failure an error.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIB = SOURCES / "lib"
RECORD = "build.txt"
JOBS = 2
AGAIN = "python -m trilevel.attention.native.build"

FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized",
)  # fmt: skip
THREADS = "-fopenmp"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")
_X86 = {
    "amx": (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DTRILEVEL_USE_AMX"),
    "avx512_bf16": (*AVX512, "-mavx512bf16"),
    "avx512": AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": (),
}
_MACHINES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": _X86,
    "amd64": _X86,
    "aarch64": {"neon": ()},
    "arm64": {"neon": ()},
}
# flags of each instruction set of this machine's family, best first; the last is what every such machine runs
TARGETS = _MACHINES.get(platform.machine().lower(), {"portable": ()})
BASELINE = list(TARGETS)[-1]


class BuildError(Exception):
    """`TRILEVEL_BUILD` asks for what cannot be had."""


def library_name(isa: str) -> str:
    """The file name of the library for an instruction set."""
    return f"libtrilevel_{isa}.so"


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: what `CXX` names, else the first of g++, clang++ and c++ that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    return None


def unknown_flags(compiler: list[str], flags: tuple[str, ...]) -> list[str]:
    """Those of `flags` that the compiler refuses."""
    return [flag for flag in flags if _run([*compiler, flag, "-fsyntax-only", "-x", "c++", os.devnull]).returncode]


def compile_library(compiler: list[str], flags: tuple[str, ...], out: Path, source: str = "kernels.cpp") -> str | None:
    """Compile the kernels to `out`, whole or not at all; what went wrong, or None."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    done = _run([*compiler, *flags, str(SOURCES / source), "-o", str(partial)])
    if done.returncode == 0:
        partial.replace(out)
        return None
    partial.unlink(missing_ok=True)
    lines = (done.stderr or "").splitlines()
    return next((line.strip() for line in lines if "error" in line), lines[0] if lines else f"exit {done.returncode}")


def build(folder: Path = LIB) -> list[str]:
    """Build into `folder` what is not there yet or differs, and write build.txt; the instruction sets that are built.

    Raises:
        BuildError: `TRILEVEL_BUILD` is `require` and a step failed, or it has an unknown value.
    """
    mode = os.environ.get("TRILEVEL_BUILD", "") or "1"
    if mode not in ("0", "1", "require"):
        raise BuildError(f"TRILEVEL_BUILD={mode!r} is unknown; use 0 (build nothing), 1 (try) or require.")
    folder.mkdir(parents=True, exist_ok=True)
    compiler = find_compiler()
    if mode == "0":
        states = {"none": "not built: TRILEVEL_BUILD=0 was set"}
    elif compiler is None:
        given = os.environ.get("CXX")
        looked_for = f"CXX={given}" if given else "g++, clang++ and c++"
        states = {"none": f"failed at finding a C++ compiler: looked for {looked_for}"}
    else:
        states = _build_all(folder, compiler)
    built = [isa for isa in TARGETS if states.get(isa, "").startswith("built")]
    for isa in set(TARGETS) - set(built):
        (folder / library_name(isa)).unlink(missing_ok=True)
    (folder / RECORD).write_text("".join(f"{name}: {state}\n" for name, state in states.items()), encoding="utf-8")
    failed = [f"{name}: {state}" for name, state in states.items() if state.startswith("failed")]
    if failed and mode == "require":
        raise BuildError(f"native kernels, {'; '.join(failed)}. Set TRILEVEL_BUILD=0 to go on without them.")
    for line in failed:
        _say(f"{line}. trilevel works without it, slower; to try again: {AGAIN}")
    return built


def _build_all(folder: Path, compiler: list[str]) -> dict[str, str]:
    version = (_run([*compiler, "--version"]).stdout or "unknown").splitlines()[0]
    states = {"compiler": version}
    flags: tuple[str, ...] = (*FLAGS, THREADS)
    if unknown_flags(compiler, (THREADS,)):
        flags = FLAGS
        states["threads"] = f"one only, {compiler[0]} does not know {THREADS}"
    before = read_record(folder)

    def make(isa: str) -> str:
        if unknown := unknown_flags(compiler, TARGETS[isa]):
            return f"left out, {compiler[0]} does not know {' '.join(unknown)}"
        command = (*flags, *TARGETS[isa])
        state, out = f"built ({_digest(version, *compiler, *command)})", folder / library_name(isa)
        if before.get(isa) == state and out.exists():
            return state
        _say(f"compiling for {isa}")
        error = compile_library(compiler, command, out)
        return f"failed at compiling kernels.cpp: {error}" if error else state

    with ThreadPoolExecutor(JOBS) as pool:
        return states | dict(zip(TARGETS, pool.map(make, TARGETS), strict=True))


def _digest(*words: str) -> str:
    """Of all that a library is made from, so that one that is up to date is kept."""
    total = hashlib.sha256("\0".join(words).encode())
    for file in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def read_record(folder: Path) -> dict[str, str]:
    """What build.txt of a folder says: the state of each instruction set; empty when nothing was ever built there."""
    file = folder / RECORD
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {name: state for name, _, state in (line.partition(": ") for line in lines)}


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # messages in English, which is what `compile_library` looks for
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env=environment, timeout=900
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", f"error: {error}")


def _say(line: str) -> None:
    sys.stderr.write(f"trilevel, native kernels: {line}\n")


def main() -> int:
    """Build into the package's own folder and say what was built."""
    try:
        built = build()
    except BuildError as error:
        _say(str(error))
        return 2
    _say(f"built: {', '.join(built) or 'none'} ({LIB / RECORD})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
