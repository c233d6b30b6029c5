"""Load on a server from a process of its own, and what came of it.

Open loop: requests are sent at times drawn beforehand (Poisson), whether earlier ones were answered or not, and a
latency counts from the time at which its request was to be sent. A server that stands still is thus charged for all
requests that fell into that time, also those that the generator itself could not send (no coordinated omission). Closed
loop: so many connections, each with one request at a time, for costs and never for latencies under load.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trilevel.errors import ImplementationError

Floats = npt.NDArray[np.float64]
Protocol = Literal["rest", "grpc"]
LOST, NOT_ACCEPTED = 0, -1
"""In the place of a status: no answer came; or the connection was refused, so that nothing was ever sent."""
OK = 200
_START_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is sent.

    Attributes:
        port: on loopback.
        path: of HTTP, or the full name of the method of gRPC.
        protocol: see there.
        rate: requests a second, drawn as a Poisson process; None for a closed loop.
        connections: of the closed loop; of the open one those that are opened beforehand, and more where all wait.
        seconds: during which requests are to be sent.
        timeout_s: after which an answer is no longer waited for.
        deadline_s: told to the server; None for none.
        headers: of HTTP.
        is_fresh: whether each request opens a connection of its own, so that none meets one that is being closed.
        keeps: whether answers are kept.
        seed: of the times, and of the order of the bodies.
    """

    port: int
    path: str
    protocol: Protocol = "rest"
    rate: float | None = None
    connections: int = 1
    seconds: float = 1.0
    timeout_s: float = 30.0
    deadline_s: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    is_fresh: bool = False
    keeps: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Load:
    """What came of it: arrays of one entry a request, in seconds from the start.

    Attributes:
        intended: when it was to be sent; in a closed loop when it was.
        sent, done: when it was, and when its answer was there; NaN for never.
        status: of HTTP (that of gRPC mapped to it), `LOST` or `NOT_ACCEPTED`.
        body: which of the bodies it sent.
        seconds: during which requests were to be sent.
        num_extra: answers that nobody had asked for, or to another request than the one that waited.
        replies: empty unless they were kept.
    """

    intended: Floats
    sent: Floats
    done: Floats
    status: npt.NDArray[np.int64]
    body: npt.NDArray[np.int64]
    seconds: float
    num_extra: int = 0
    replies: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.intended)

    @property
    def is_ok(self) -> npt.NDArray[np.bool_]:
        """Which requests were answered."""
        found: npt.NDArray[np.bool_] = self.status == OK
        return found

    @property
    def num_lost(self) -> int:
        """Requests that were accepted and got no answer, not even an error."""
        return int((self.status == LOST).sum())

    @property
    def latencies(self) -> Floats:
        """Of the requests that were answered, from when they were to be sent."""
        return (self.done - self.intended)[self.is_ok]

    def percentile_ms(self, percent: float) -> float | None:
        """Of the latencies of the answered; None where nothing was answered."""
        found = self.latencies
        return 1e3 * float(np.percentile(found, percent)) if len(found) else None

    def goodput(self, slo_s: float) -> float:
        """Answers a second that came within the time, counted over the time in which requests were to be sent."""
        return float((self.latencies <= slo_s).sum()) / self.seconds

    def counts(self) -> dict[str, int]:
        """Requests by status."""
        found, number = np.unique(self.status, return_counts=True)
        names = {LOST: "lost", NOT_ACCEPTED: "not accepted"}
        return {names.get(one, str(one)): count for one, count in zip(found.tolist(), number.tolist(), strict=True)}


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> Floats:
    """Times within `seconds` of a Poisson process: its gaps are independent and exponential."""
    count = int(rate * seconds + 10 * (rate * seconds) ** 0.5 + 10)
    times = np.cumsum(rng.exponential(1 / rate, count))
    return times[times < seconds]


class Running:
    """A load that is under way."""

    def __init__(self, spec: Spec, bodies: Sequence[bytes]) -> None:
        self.spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="trilevel-load-")
        folder = Path(self._folder.name)
        save_bytes(folder / "bodies.npz", bodies)
        (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")
        command = [sys.executable, "-m", "trilevel.bench.serving.client", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        # it says when it begins: what it takes to start is no part of the load
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "begins":
            raise ImplementationError(f"the load generator ended with {self._process.wait()} before it began.")

    def result(self) -> Load:
        """Wait for the end.

        Raises:
            ImplementationError: the generator failed.
        """
        try:
            code = self._process.wait(self.spec.seconds + self.spec.timeout_s + _START_S)
            if code:
                raise ImplementationError(f"the load generator ended with {code}.")
            folder = Path(self._folder.name)
            with np.load(folder / "load.npz", allow_pickle=False) as found:
                arrays: dict[str, Any] = dict(found)
            num_extra = int(arrays.pop("num_extra"))
            replies = load_bytes(folder / "replies.npz") if self.spec.keeps else ()
            return Load(**arrays, num_extra=num_extra, seconds=self.spec.seconds, replies=replies)
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, whatever is under way."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._folder.cleanup()


def run_load(spec: Spec, bodies: Sequence[bytes]) -> Load:
    """Send, and wait for the end."""
    return Running(spec, bodies).result()


def save_bytes(path: Path, values: Sequence[bytes]) -> None:
    """Strings of bytes, without pickles."""
    ends = np.cumsum([len(one) for one in values], dtype=np.int64)
    np.savez(path, data=np.frombuffer(b"".join(values), np.uint8), ends=ends)


def load_bytes(path: Path) -> list[bytes]:
    """What `save_bytes` wrote."""
    with np.load(path, allow_pickle=False) as found:
        data, ends = found["data"].tobytes(), found["ends"].tolist()
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
