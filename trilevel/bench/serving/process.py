"""A server in processes of its own: started, watched, paused while another one is measured, ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import final

from trilevel.errors import ImplementationError

_PROC = Path("/proc")
_POLL_S = 0.05
_LAST_LINES = 3
# below those that systems give to connections and to port 0, where a port that was just found free may be taken
_PORTS = (20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens at now, for servers that cannot be given port 0."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            port = random.SystemRandom().randrange(*_PORTS)
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
    return found


@final
class ServerProcess:
    """A command that serves, and all processes below it.

    Args:
        command: to run.
        ready: path that answers 200 once it serves.
        port: of HTTP, on loopback.
        environment: added to this process's.
        start_s: until it is ready.

    Attributes:
        started_s: that it took to be ready.

    Raises:
        ImplementationError: it ended, or was not ready in time; with the last lines that it said.
    """

    def __init__(
        self,
        command: Sequence[str],
        ready: str,
        port: int,
        environment: Mapping[str, str] | None = None,
        start_s: float = 180.0,
    ) -> None:
        self.port, self._ready = port, ready
        # closed when the processes are ended
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        begun = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )
        try:
            while not self.is_ready:
                if self._process.poll() is not None:
                    raise ImplementationError(f"{command[0]} ended with {self._process.returncode}: {self.said}")
                if time.monotonic() - begun > start_s:
                    raise ImplementationError(f"{command[0]} was not ready within {start_s:g} s: {self.said}")
                time.sleep(_POLL_S)
        except BaseException:
            self.kill()
            raise
        self.started_s = time.monotonic() - begun

    @property
    def is_ready(self) -> bool:
        """Whether it says that it serves."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready}", timeout=5) as answer:
                return int(answer.status) == 200
        except (OSError, urllib.error.URLError, ValueError):
            return False

    @property
    def said(self) -> str:
        """The last lines of what it wrote."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-_LAST_LINES:]) or "it said nothing"

    @property
    def pids(self) -> list[int]:
        """Of all its processes, the first one first."""
        return list(_tree(self._process.pid))

    @property
    def cpu_s(self) -> float:
        """Seconds of processors that it has taken, with those of its processes that have ended."""
        ticks = sum(_ticks(pid) for pid in self.pids)
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def memory_bytes(self) -> int:
        """That its processes hold, what they share divided among them."""
        return sum(_held(pid) for pid in self.pids)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let it run, and stop all its processes behind it: what idles takes time from what is measured."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def pause(self) -> None:
        """Stop all its processes."""
        self._signal(signal.SIGSTOP)

    def terminate(self, timeout_s: float = 60.0) -> float:
        """Ask it to end: seconds until it had; raises ImplementationError where it has not in time."""
        begun = time.monotonic()
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ImplementationError(f"a server did not end within {timeout_s:g} s of SIGTERM.") from error
        return time.monotonic() - begun

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask it to end, so that it takes its files and shared memory with it; then as `kill`."""
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            below = self.pids[1:]
            with contextlib.suppress(ImplementationError):
                self.terminate(timeout_s)
            self._end(below)
        self.kill()

    def kill(self) -> None:
        """End all its processes now."""
        if self._process.poll() is None:
            # those below go last: the first one would start them anew
            self._end(self.pids)
        self._process.wait()
        self._said.close()

    def _end(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in _PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text(encoding="ascii").split():
                yield from _tree(int(child))


def _ticks(pid: int) -> int:
    """Of a process, and of those below it that have ended."""
    try:
        # its name, which stands in brackets before the numbers, may hold anything
        fields = (_PROC / f"{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))


def _held(pid: int) -> int:
    try:
        lines = (_PROC / f"{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
