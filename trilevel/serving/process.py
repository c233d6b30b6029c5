"""One worker process, as its supervisor sees it: its socket, its job, and when it was last heard."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import numpy.typing as npt

from trilevel.errors import ArtifactError
from trilevel.serving.frames import Frame, FrameError, Reader, encode
from trilevel.serving.requests import Arrays
from trilevel.serving.worker import OUTPUT, STATE

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Rows for the segments of a family from one of them on, for as long as no row leaves.

    Attributes:
        family: its name.
        segment: the first to run, from 0.
        rows: how many.
        arrays: that it reads.
        leave: for each segment that may run, the margin from which a row leaves behind it; None where nobody is asked.
    """

    family: str
    segment: int
    rows: int
    arrays: Arrays
    leave: tuple[float | None, ...] = (None,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a worker made of a job; or an error, `is_input` if the rows are at fault.

    Attributes:
        state: behind the last segment that ran; empty if that was the last that may run.
        outputs: of each segment that ran.
        seconds: of each.
    """

    state: Arrays
    outputs: tuple[Arrays, ...]
    seconds: tuple[float, ...]
    error: str = ""
    is_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """The worker ended before it answered."""

    reason: str


@final
class Process(asyncio.BufferedProtocol):
    """A worker.

    Args:
        opener, options: what it opens.
        threads: that libraries in it start with.
        start_timeout_s: until it is ready.
        beat_s: how often it shows that it lives.
        on_idle: called when a job is done, after the job's own callback.

    Attributes:
        is_ready: the model is open and the process is there.
        was_ready: it was once.
        ended: set when it is gone.
        failure: why.
        heard: when the last bytes came, of `time.monotonic`.
        busy_since: when its job was given to it; None without one.
        num_done: jobs that it answered.
    """

    def __init__(
        self,
        opener: str,
        options: Mapping[str, Any],
        *,
        threads: int,
        start_timeout_s: float,
        beat_s: float,
        on_idle: Callable[[], None],
    ) -> None:
        self._first = {"opener": opener, "options": dict(options), "beat_s": beat_s}
        self._threads, self._start_timeout_s, self._on_idle = threads, start_timeout_s, on_idle
        self.is_ready = self.was_ready = False
        self.ended = asyncio.Event()
        self.failure = ""
        self.heard = time.monotonic()
        self.busy_since: float | None = None
        self.num_done = 0
        self._done: Callable[[Done | Gone], None] | None = None
        self._number = 0
        self._reader = Reader()
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._facts: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        # it may end with nobody waiting
        self._facts.add_done_callback(lambda future: future.cancelled() or future.exception())

    @property
    def is_idle(self) -> bool:
        """Whether it may be given a job."""
        return self.is_ready and self._done is None

    @property
    def pid(self) -> int:
        """Of the process, 0 before it is started."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> Mapping[str, Any]:
        """Start it and wait until it is ready: what it says of the model.

        Raises:
            ArtifactError: it cannot open the model, ended, or was not ready in time.
            OSError: the system starts no more processes.
        """
        try:
            await self._connect()
            self._write(encode(self._first))
            async with asyncio.timeout(self._start_timeout_s):
                facts = await asyncio.shield(self._facts)
        except TimeoutError:
            self.kill(f"it was not ready within {self._start_timeout_s:g} s")
            raise ArtifactError(f"a worker was killed: {self.failure}.") from None
        except BaseException as error:
            self.kill(f"it could not be started ({type(error).__name__})")
            raise
        self.heard = time.monotonic()
        return facts

    async def _connect(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            command = [sys.executable, "-P", "-m", "trilevel.serving.worker", str(theirs.fileno())]
            # what is found here is found there, and nothing in the folder where the server was started
            paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            environment = os.environ | dict.fromkeys(_THREADS, str(self._threads)) | paths
            # a group of its own: an interrupt at the terminal is for the supervisor, which drains first
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )
            await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()

    def submit(self, job: Job, done: Callable[[Done | Gone], None]) -> None:
        """Give it a job; it must be idle. Raises FrameError for arrays that cannot be sent."""
        assert self.is_idle
        number = self._number + 1
        fields = {
            "job": number,
            "family": job.family,
            "segment": job.segment,
            "rows": job.rows,
            "leave": job.leave,
        }
        parts = encode(fields, job.arrays)
        self._number, self._done, self.busy_since = number, done, time.monotonic()
        self._write(parts)

    def kill(self, reason: str) -> None:
        """End it now; what follows is what follows when it ends by itself."""
        self.failure = self.failure or reason
        if self._process is not None:
            self._process.kill()
        if self._transport is not None:
            self._transport.abort()
        else:
            self.ended.set()

    async def stop(self, timeout_s: float) -> None:
        """Close its socket, wait until it is gone, and kill it if it does not go."""
        self.is_ready = False
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None:
            if timeout_s <= 0:
                self._process.kill()
            await asyncio.get_running_loop().run_in_executor(None, _reap, self._process, timeout_s)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong; called by the event loop, as all below."""
        return self._reader.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take the bytes that came."""
        self.heard = time.monotonic()
        try:
            for frame in self._reader.filled(nbytes):
                self._take(frame)
        except (FrameError, IndexError, KeyError, TypeError, ValueError) as error:
            self.kill(f"it sent what is no answer ({error})")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what writes."""
        # uvloop's transports are no subclass of it
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail its job."""
        self.is_ready = False
        self.failure = self.failure or "it ended by itself or was killed"
        if not self._facts.done():
            self._facts.set_exception(ArtifactError(f"a worker ended before it was ready: {self.failure}."))
        self.ended.set()
        done, self._done, self.busy_since = self._done, None, None
        if done is not None:
            done(Gone(reason=self.failure))

    def _take(self, frame: Frame) -> None:
        fields = frame.fields
        if "job" in fields:
            self._answered(frame)
        elif "ready" in fields:
            self.is_ready = self.was_ready = True
            self._facts.set_result(fields["ready"])
        elif "failed" in fields:
            self.failure = f"{fields['kind']}: {fields['failed']}"
            self._facts.set_exception(ArtifactError(str(fields["failed"])))

    def _answered(self, frame: Frame) -> None:
        fields = frame.fields
        if self._done is None or fields["job"] != self._number:
            raise FrameError("an answer to no question")
        seconds = tuple(map(float, fields.get("seconds", ())))
        state: dict[str, npt.NDArray[Any]] = {}
        outputs: tuple[dict[str, npt.NDArray[Any]], ...] = tuple({} for _ in seconds)
        for name, array in frame.arrays.items():
            if name.startswith(STATE):
                state[name.removeprefix(STATE)] = array
            else:
                number, _, own = name.removeprefix(OUTPUT).partition(".")
                outputs[int(number)][own] = array
        found = Done(
            state=state,
            outputs=outputs,
            seconds=seconds,
            error=str(fields.get("error", "")),
            is_input=bool(fields.get("is_input", False)),
        )
        done, self._done, self.busy_since = self._done, None, None
        self.num_done += 1
        done(found)
        self._on_idle()

    def _write(self, parts: list[bytes | memoryview]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            for part in parts:
                self._transport.write(part)


def _reap(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        process.wait(max(timeout_s, 0.01))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
