"""The process that sends, `python -m trilevel.bench.serving.client FOLDER`: see `trilevel.bench.serving.load`."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol, cast, final

import numpy as np

from trilevel.bench.serving.load import LOST, NOT_ACCEPTED, OK, Spec, load_bytes, poisson, save_bytes
from trilevel.serving.server import run
from trilevel.serving.status import STATUS

_END = b"\r\n\r\n"
_MOST_OPEN = 4096
_ID = b"x-request-id: "


class Channel(Protocol):
    """What sends one request at a time."""

    async def ask(self, body: bytes, name: str) -> tuple[int, bytes]:
        """The status and the answer; ConnectionError where none comes."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


@final
class Http(asyncio.Protocol):
    """A connection that is kept alive; counts in `num_extra` what was not asked for."""

    num_extra = 0

    def __init__(self, spec: Spec) -> None:
        fixed = {"host": f"127.0.0.1:{spec.port}", "content-type": "application/json", **spec.headers}
        if spec.deadline_s is not None:
            fixed["x-request-timeout-ms"] = str(max(1, round(spec.deadline_s * 1000)))
        if spec.is_fresh:
            fixed["connection"] = "close"
        lines = [f"POST {spec.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fixed.items())]
        self._head = "\r\n".join(lines).encode()
        self._transport: asyncio.Transport | None = None
        self._waits: asyncio.Future[tuple[int, bytes]] | None = None
        self._name = b""
        self._data = bytearray()
        self.is_open = False

    async def ask(self, body: bytes, name: str) -> tuple[int, bytes]:
        """As of `Channel`."""
        if not self.is_open or self._transport is None:
            raise ConnectionResetError
        self._waits, self._name = asyncio.get_running_loop().create_future(), name.encode()
        head = b"%b\r\ncontent-length: %d\r\n%b%b%b" % (self._head, len(body), _ID, self._name, _END)
        self._transport.write(head + body)
        return await self._waits

    def close(self) -> None:
        """As of `Channel`."""
        self.is_open = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what writes."""
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody will answer."""
        self.is_open = False
        if self._waits is not None and not self._waits.done():
            self._waits.set_exception(exc or ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        """Take an answer; what comes without a question is counted."""
        self._data += data
        if (end := self._data.find(_END)) < 0:
            return
        head = bytes(self._data[:end]).lower()
        _, _, length = head.partition(b"content-length: ")
        size = end + len(_END) + int(length.split(b"\r\n", 1)[0] or 0)
        if len(self._data) < size:
            return
        body = bytes(self._data[end + len(_END) : size])
        del self._data[:size]
        _, has_id, own = head.partition(_ID)
        is_asked = self._waits is not None and not self._waits.done()
        if self._data or not is_asked or (has_id and own.split(b"\r\n", 1)[0] != self._name):
            Http.num_extra += 1
        if b"connection: close" in head:
            self.is_open = False
        if self._waits is not None and is_asked:
            self._waits.set_result((int(head.split(b" ", 2)[1]), body))


@final
class Rpc:
    """A channel of gRPC with a connection of its own."""

    def __init__(self, spec: Spec, number: int) -> None:
        from grpc import aio  # type: ignore[import-untyped]

        # channels of one process share connections unless they are told not to
        options = [("grpc.use_local_subchannel_pool", 1), ("trilevel.number", number)]
        self._channel = aio.insecure_channel(f"127.0.0.1:{spec.port}", options=options)
        self._call = self._channel.unary_unary(spec.path)
        self._timeout_s = spec.deadline_s
        self.is_open = True

    async def ask(self, body: bytes, name: str) -> tuple[int, bytes]:
        """As of `Channel`."""
        from grpc import StatusCode, aio

        try:
            return OK, await self._call(body, timeout=self._timeout_s, metadata=(("x-request-id", name),))
        except aio.AioRpcError as error:
            if error.code() == StatusCode.UNAVAILABLE:
                raise ConnectionResetError from error
            return http_status(error.code().name), b""

    def close(self) -> None:
        """Connections are closed when the process ends."""


def http_status(name: str) -> int:
    """The status of HTTP that says what one of gRPC says.

    >>> http_status("RESOURCE_EXHAUSTED"), http_status("DEADLINE_EXCEEDED"), http_status("UNKNOWN")
    (429, 504, 500)
    """
    found = {one.grpc: one.http for one in STATUS.values()} | {"RESOURCE_EXHAUSTED": 429, "DEADLINE_EXCEEDED": 504}
    return found.get(name, 500)


@final
class Sender:
    """Sends bodies through connections that are free, and writes down what came of it."""

    def __init__(self, spec: Spec, bodies: list[bytes], order: list[int]) -> None:
        self.spec, self._bodies, self._order = spec, bodies, order
        self._free: list[Any] = []
        self._num_open = 0
        self.rows: list[tuple[float, float, float, int, int]] = []
        self.replies: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._begun = 0.0
        self._count = 0

    async def open_first(self) -> None:
        """Open the connections that are there from the beginning."""
        if not self.spec.is_fresh:
            self._free = [await self._open() for _ in range(self.spec.connections)]

    async def _open(self) -> Channel:
        self._num_open += 1
        if self.spec.protocol == "grpc":
            return Rpc(self.spec, self._num_open)
        _, protocol = await self._loop.create_connection(lambda: Http(self.spec), "127.0.0.1", self.spec.port)
        return protocol

    def _now(self) -> float:
        # uvloop's own clock knows milliseconds alone
        return time.monotonic() - self._begun

    async def send(self, number: int, intended: float) -> None:
        """Send one request, wait for its answer, and keep both times."""
        sent, status, reply = float("nan"), NOT_ACCEPTED, b""
        body = self._order[number % len(self._order)]
        channel: Any = None
        try:
            async with asyncio.timeout(self.spec.timeout_s - (self._now() - intended)):
                channel = self._free.pop() if self._free else await self._open()
                while not channel.is_open:
                    # the server closed it while nothing was asked
                    channel = self._free.pop() if self._free else await self._open()
                sent = self._now()
                status = LOST
                status, reply = await channel.ask(self._bodies[body], f"load-{number}")
        except (OSError, TimeoutError):
            if channel is not None:
                channel.close()
        done = self._now() if status > LOST else float("nan")
        if channel is not None and channel.is_open and not self.spec.is_fresh:
            self._free.append(channel)
        self.rows.append((intended, sent, done, status, body))
        if self.spec.keeps:
            self.replies.append(reply)

    async def open_loop(self, times: list[float]) -> None:
        """Send each request at its time."""
        self._begun, tasks = time.monotonic(), set()
        for number, intended in enumerate(times):
            if (wait := intended - self._now()) > 0:
                await asyncio.sleep(wait)
            task = self._loop.create_task(self.send(number, intended))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            while len(tasks) >= _MOST_OPEN:
                # as if the generator stood still: those that are late are charged for it
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*tasks)

    async def closed_loop(self) -> None:
        """Keep each connection at one request at a time."""
        self._begun = time.monotonic()
        await asyncio.gather(*(self._keeps_asking() for _ in range(self.spec.connections)))

    async def _keeps_asking(self) -> None:
        while (now := self._now()) < self.spec.seconds:
            self._count += 1
            await self.send(self._count - 1, now)


async def load(folder: Path) -> None:
    """Send what the folder says and write down there what came of it."""
    spec = Spec(**json.loads((folder / "spec.json").read_text(encoding="utf-8")))
    bodies = load_bytes(folder / "bodies.npz")
    rng = np.random.default_rng(spec.seed)
    order = rng.permutation(np.arange(10 * len(bodies)) % len(bodies)).tolist()
    times = [] if spec.rate is None else poisson(spec.rate, spec.seconds, rng).tolist()
    sender = Sender(spec, bodies, order)
    await sender.open_first()
    # a pause of the generator would look like one of the server
    gc.collect()
    gc.disable()
    sys.stdout.write("begins\n")
    sys.stdout.flush()
    await (sender.closed_loop() if spec.rate is None else sender.open_loop(times))
    columns = list(zip(*sender.rows, strict=True)) or [()] * 5
    kinds = (np.float64, np.float64, np.float64, np.int64, np.int64)
    names = ("intended", "sent", "done", "status", "body")
    arrays = {name: np.array(own, kind) for name, own, kind in zip(names, columns, kinds, strict=True)}
    np.savez(folder / "load.npz", num_extra=np.array(Http.num_extra), **arrays)  # type: ignore[arg-type]
    if spec.keeps:
        save_bytes(folder / "replies.npz", sender.replies)


if __name__ == "__main__":
    run(load(Path(sys.argv[1])))
