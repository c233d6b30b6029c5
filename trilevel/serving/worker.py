"""A worker process: opens a model, runs jobs of (family, segment, arrays), and ends when its supervisor does.

It gets one end of a socket pair. The first frame says what to open; then each job is answered in turn, and a beat is
sent all along, so that a worker that hangs is told from one that has much to do.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy.typing as npt

from trilevel.errors import ArtifactError, InputError, TrilevelError
from trilevel.routing.router import margin
from trilevel.serving.frames import Frame, FrameError, Reader, encode
from trilevel.serving.requests import Arrays

Array = npt.NDArray[Any]
STATE, OUTPUT = "state.", "output."
"""Begin the names of arrays in a job's answer."""


class Runner(Protocol):
    """A model that a worker has opened."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the supervisor must know of it; JSON types."""
        ...

    def run(self, family: str, segment: int, arrays: Arrays) -> tuple[Arrays, Arrays]:
        """The state that the next segment reads, and outputs by name; the first axis of each is the rows.

        Raises:
            InputError: the rows are at fault.
            TrilevelError: they cannot be run.
        """
        ...


Opener = Callable[[Mapping[str, Any]], Runner]


def named(path: str) -> Any:
    """What `module:name` names; supervisors choose it, never a request."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def serve(connection: socket.socket) -> None:
    """Open what the first frame says and answer jobs until the other side is gone."""
    frames = _frames(connection)
    lock = threading.Lock()
    fields = next(frames).fields
    _beat(connection, lock, float(fields["beat_s"]))
    try:
        opener: Opener = named(fields["opener"])
        runner = opener(fields["options"])
    # whatever it is, the supervisor must hear of it
    except Exception as error:
        _send(connection, lock, encode({"failed": _said(error), "kind": type(error).__name__}))
        return
    _send(connection, lock, encode({"ready": dict(runner.facts)}))
    for frame in frames:
        _send(connection, lock, _answer(runner, frame))


def _answer(runner: Runner, frame: Frame) -> list[bytes | memoryview]:
    job = frame.fields
    try:
        found, seconds = _run(runner, job, frame.arrays)
        rows = {len(array) if array.ndim else -1 for array in found.values()}
        if rows != {job["rows"]}:
            raise ArtifactError(f"the model gave arrays of {sorted(rows)} rows for {job['rows']}.")
        return encode({"job": job["job"], "seconds": seconds}, found)
    # a job that fails must not end the worker
    except Exception as error:
        is_input = isinstance(error, InputError)
        return encode({"job": job["job"], "error": _said(error), "is_input": is_input})


def _run(runner: Runner, job: Mapping[str, Any], arrays: Arrays) -> tuple[dict[str, Array], list[float]]:
    """Outputs of each segment that ran, and the state behind the last of them; seconds of each.

    As long as all rows stay, segment follows segment: there is nothing to group anew, and no state to send around.
    """
    found: dict[str, Array] = {}
    seconds = []
    for number, wanted in enumerate(job["leave"]):
        start = time.perf_counter()
        arrays, outputs = runner.run(job["family"], job["segment"] + number, arrays)
        seconds.append(time.perf_counter() - start)
        found |= {f"{OUTPUT}{number}.{name}": array for name, array in outputs.items()}
        if wanted is not None and (margin(next(iter(outputs.values()))) >= wanted).any():
            break
    is_last = len(seconds) == len(job["leave"])
    return found | ({} if is_last else {STATE + name: array for name, array in arrays.items()}), seconds


def _said(error: Exception) -> str:
    # messages of other libraries may quote what was sent
    return str(error) if isinstance(error, TrilevelError) else f"{type(error).__name__} in the worker"


def _frames(connection: socket.socket) -> Iterator[Frame]:
    reader = Reader()
    while count := connection.recv_into(reader.buffer):
        yield from reader.filled(count)


def _send(connection: socket.socket, lock: threading.Lock, parts: list[bytes | memoryview]) -> None:
    with lock:
        for part in parts:
            connection.sendall(part)


def _beat(connection: socket.socket, lock: threading.Lock, every_s: float) -> None:
    beat = encode({"beat": True})

    def beats() -> None:
        while True:
            time.sleep(every_s)
            try:
                _send(connection, lock, beat)
            except OSError:
                # the supervisor is gone; whatever runs is for nobody
                os._exit(1)

    threading.Thread(target=beats, daemon=True, name="beat").start()


def main(descriptor: int) -> int:
    """Serve on the socket of this descriptor; the exit status."""
    # a terminal or a service manager signals all processes; workers end when the supervisor closes the socket
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        serve(socket.socket(fileno=descriptor))
    except (StopIteration, ConnectionError, BrokenPipeError):
        return 0
    except FrameError as error:
        sys.stderr.write(f"trilevel worker: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    # threads of a runtime may not end by themselves
    os._exit(main(int(sys.argv[1])))
