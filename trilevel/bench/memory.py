"""Peak memory of one function, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from trilevel.errors import ImplementationError

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory_bytes(prepare: str, *args: Any, timeout_s: float = 120.0) -> int:
    """Run `prepare(*args)()` in a fresh process; bytes by which its resident memory rose above what `prepare` left.

    Linux only: the high-water mark of the process is read from `/proc` (`ru_maxrss` would count the parent's memory
    before `exec`).

    Args:
        prepare: `module:function`, which makes the inputs and returns the call to measure.
        args: its arguments, as JSON can carry them.
        timeout_s: seconds after which the process is stopped.

    Raises:
        ImplementationError: the process failed, ran out of time, or this is no Linux.
    """
    return _in_process(prepare, args, timeout_s)[1]


def peak_process_bytes(prepare: str, *args: Any, timeout_s: float = 120.0) -> int:
    """As `peak_memory_bytes`, but of all that the process ever held: interpreter, libraries and weights included."""
    return _in_process(prepare, args, timeout_s)[0]


def _in_process(prepare: str, args: tuple[Any, ...], timeout_s: float) -> tuple[int, int]:
    if not STATUS.exists():
        raise ImplementationError("peak memory is read from /proc, which only Linux has. Leave --memory out.")
    command = [sys.executable, "-m", "trilevel.bench.memory", prepare, json.dumps(args)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
        whole, rise = map(int, done.stdout.splitlines()[-1].split())
        return whole, rise
    except subprocess.TimeoutExpired as error:
        raise ImplementationError(f"{prepare}{args} took more than {timeout_s:.0f} s. Raise timeout_s.") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:]
        raise ImplementationError(f"{prepare}{args} failed in its process: {' '.join(last)}") from error


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def _measure(prepare: str, args: list[Any]) -> tuple[int, int]:
    module, _, name = prepare.partition(":")
    function: Callable[..., Callable[[], object]] = getattr(import_module(module), name)
    run = function(*args)
    before, loading = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    # 5 resets the high-water mark, so that making the inputs does not count
    CLEAR_REFS.write_text("5", encoding="ascii")
    run()
    peak = _status_bytes("VmHWM")
    return max(peak, loading), max(0, peak - before)


if __name__ == "__main__":
    whole, rise = _measure(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.write(f"{whole} {rise}\n")
