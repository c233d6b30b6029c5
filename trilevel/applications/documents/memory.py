"""Memory of processes and of the machine, from the system's own counters."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_PROC = Path("/proc")
# parameters of glibc's mallopt
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def reset_peak() -> None:
    """Set this process's high-water mark back to what is resident now, where the system can (Linux)."""
    try:
        # 5 is the code for the high-water mark
        (_PROC / "self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes(process: int | None = None) -> int | None:
    """High-water mark of resident memory of a process (default: this one); None for another one where unknown."""
    try:
        status = (_PROC / str(process or "self") / "status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        return None if process else _peak_of_this_process()


def _peak_of_this_process() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    # bytes on macOS, KiB elsewhere
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_bytes() -> int | None:
    """Memory that a new process may use: what is available, and what the control group allows; None where unknown."""
    known = [value for value in (_available(), _control_group_rest()) if value is not None]
    return min(known) if known else None


def _available() -> int | None:
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration):
        pass
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _control_group_rest(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left under the limit of this process's control group (version 2); page cache can be given back."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text(encoding="ascii"))
        counters = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(limit) - used + int(counters.get("inactive_file", "0")))
    except (OSError, ValueError):
        return None


def return_freed(at_once: bool) -> None:
    """Make this process's C library give every larger freed block back at once, or keep them for the next allocation.

    Without it a peak measures the allocator's leftovers as well: the same pass varies by a quarter from run to run.
    Only glibc has the switch; elsewhere nothing changes.
    """
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    threshold = 64 * 1024 if at_once else 32 * 1024 * 1024
    library.mallopt(_MMAP_THRESHOLD, threshold)
    library.mallopt(_TRIM_THRESHOLD, 2 * threshold)
