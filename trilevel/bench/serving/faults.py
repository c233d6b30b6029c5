"""What is lost when workers are killed, models exchanged and servers ended, all under load; and too much of it.

Every request is one row that no other request has, so an answer that went to another one is seen. A request counts as
lost when its connection was taken and nothing came back; an error is an answer, and is counted beside.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilevel.bench.harness import Progress
from trilevel.bench.serving.environments import INFER
from trilevel.bench.serving.load import Load, Running, Spec
from trilevel.bench.serving.own import start_command
from trilevel.bench.serving.process import ServerProcess
from trilevel.bench.serving.trivial import NAME, is_right, open_inference_json, rows, write_trivial
from trilevel.errors import ImplementationError

_ROWS = 4096
_TIMEOUT_S = 20.0
_WORKERS = 2
_BACK_S = 60.0
_PAUSE_S = 0.5
_MARKER = "trilevel.serving.worker"
_COUNTED = "trilevel_requests_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What came of a kind of fault.

    Attributes:
        name: of it.
        times: that it was done.
        requests: that were sent while it was.
        lost: of them, see the module.
        twice: answers that nobody had asked for, that were another's, or that the server counted and no client saw.
        errors: by status.
    """

    name: str
    times: int
    requests: int
    lost: int
    twice: int
    errors: dict[str, int]

    def row(self) -> dict[str, Any]:
        """Of the table."""
        errors = ", ".join(f"{count} of {status}" for status, count in self.errors.items())
        return {
            "fault": self.name,
            "times": self.times,
            "requests": self.requests,
            "lost": self.lost,
            "twice": self.twice,
            "errors": errors or "none",
        }


def measure_faults(
    work: Path, progress: Progress, *, kills: int = 50, reloads: int = 20, drains: int = 10, rate: float = 100.0
) -> list[Fault]:
    """Each kind of fault in turn, under Poisson load.

    Args:
        work: folder for the model.
        progress: told of it.
        kills: of a worker that runs, by SIGKILL, one after another has come back.
        reloads: of the model, by the protocol's call.
        drains: of a server, by SIGTERM, each a new one.
        rate: requests a second.
    """
    folder = work / f"{NAME}-faults"
    write_trivial(folder)
    found = []
    with _server(folder) as server:
        found.append(_under_load("kill -9 of a worker", server, rate, kills, lambda: _kill(server), progress))
        found.append(_under_load("reload", server, rate, reloads, lambda: _reload(server), progress))
    found.append(_drains(folder, rate, drains, progress))
    return found


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[ServerProcess]:
    server, _ = start_command(folder, NAME, instances=_WORKERS)
    try:
        yield server
    finally:
        server.stop()


def _under_load(
    name: str, server: ServerProcess, rate: float, times: int, once: Callable[[], None], progress: Progress
) -> Fault:
    """Do it so many times while requests come, which end when it is done."""
    loads, before = list[Load](), _counted(server)
    over = threading.Event()

    def send() -> None:
        # in parts, for nobody knows beforehand how long it takes
        while not over.is_set():
            loads.append(_send(server.port, rate, 2.0, len(loads)).result())

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for number in range(times):
            progress(name, number / max(1, times))
            once()
            time.sleep(_PAUSE_S * random.random())
    finally:
        over.set()
        sender.join()
    return _fault(name, times, loads, answered=_counted(server) - before)


def _send(port: int, rate: float, seconds: float, seed: int, *, is_fresh: bool = False) -> Running:
    spec = Spec(
        port=port, path=INFER, rate=rate, seconds=seconds, timeout_s=_TIMEOUT_S, connections=16, is_fresh=is_fresh,
        keeps=True, seed=seed,
    )  # fmt: skip
    return Running(spec, open_inference_json(rows(_ROWS)))


def _fault(name: str, times: int, loads: list[Load], answered: int | None = None) -> Fault:
    """Add up what the loads saw; `answered` is what the server counted."""
    x, twice, ok = rows(_ROWS), 0, 0
    errors: dict[str, int] = {}
    for load in loads:
        good = load.is_ok
        own = [(body, reply) for body, reply, fine in zip(load.body.tolist(), load.replies, good, strict=True) if fine]
        twice += load.num_extra + sum(not is_right([body], [reply], x, "rest") for body, reply in own)
        ok += len(own)
        for status, count in load.counts().items():
            errors[status] = errors.get(status, 0) + count
    errors.pop("200", None)
    lost = sum(load.num_lost for load in loads)
    # what the server says that it answered, and no client saw, went to someone else
    twice += 0 if answered is None else max(0, answered - ok - lost)
    requests = sum(map(len, loads))
    return Fault(name=name, times=times, requests=requests, lost=lost, twice=twice, errors=errors)


def _kill(server: ServerProcess) -> None:
    """End a worker as the system would, and wait until there are as many as before."""
    before = _workers(server)
    os.kill(random.choice(before), signal.SIGKILL)
    ends = time.monotonic() + _BACK_S
    while len(now := _workers(server)) < _WORKERS or set(now) == set(before) or _gauge(server) < _WORKERS:
        if time.monotonic() > ends:
            raise ImplementationError(f"a worker that was killed did not come back within {_BACK_S:g} s.")
        time.sleep(_PAUSE_S / 5)


def _workers(server: ServerProcess) -> list[int]:
    found = []
    for pid in server.pids[1:]:
        with contextlib.suppress(OSError):
            if _MARKER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def _reload(server: ServerProcess) -> None:
    address = f"http://127.0.0.1:{server.port}/v2/repository/models/{NAME}/load"
    with urllib.request.urlopen(urllib.request.Request(address, method="POST"), timeout=_BACK_S) as answer:
        answer.read()


def _drains(folder: Path, rate: float, times: int, progress: Progress) -> Fault:
    """SIGTERM while requests come, each on a connection of its own: what is connected must be answered."""
    loads = []
    for number in range(times):
        progress("SIGTERM", number / max(1, times))
        with _server(folder) as server:
            running = _send(server.port, rate, 2.0, number, is_fresh=True)
            try:
                time.sleep(0.3 + 0.4 * random.random())
                server.terminate()
                loads.append(running.result())
            finally:
                running.stop()
    return _fault("SIGTERM", times, loads)


def _metrics(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=_BACK_S) as answer:
        return str(answer.read().decode())


def _sum(server: ServerProcess, name: str, part: str) -> float:
    lines = (line for line in _metrics(server).splitlines() if line.startswith(name) and part in line)
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _counted(server: ServerProcess) -> int:
    return int(_sum(server, _COUNTED, f'model="{NAME}",protocol="rest",status="200"'))


def _gauge(server: ServerProcess) -> float:
    return _sum(server, "trilevel_workers", f'model="{NAME}"')
