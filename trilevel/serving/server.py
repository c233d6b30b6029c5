"""REST and gRPC in one event loop around one engine, from the first request to a drained end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, final

from trilevel.errors import ConfigError
from trilevel.serving.connection import Listener
from trilevel.serving.front import Front
from trilevel.serving.logs import say
from trilevel.serving.rest import RestApp
from trilevel.serving.tasks import TaskRoute
from trilevel.serving.tls import Tls

_T = TypeVar("_T")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where a server listens and how it ends.

    Attributes:
        host: address; any but loopback is reached by other machines.
        rest_port, grpc_port: 0 leaves the choice to the system; None listens not at all.
        tls: certificates, of both; None for plain connections.
        drain_delay_s: between saying that the server is not ready and taking no more connections; as long as a load
            balancer needs to notice.
        drain_s: at most, for requests that were accepted.
    """

    host: str = "127.0.0.1"
    rest_port: int | None = 8000
    grpc_port: int | None = 8001
    tls: Tls | None = None
    drain_delay_s: float = 0.5
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        """Check every value."""
        ports = (self.rest_port, self.grpc_port)
        if ports == (None, None):
            raise ConfigError("rest_port and grpc_port are both None; a server listens at one of them at least.")
        for port in ports:
            if port is not None and not 0 <= port < 1 << 16:
                raise ConfigError(f"port {port} must lie in 0 to 65535.")
        if self.drain_delay_s < 0 or self.drain_s < 0:
            raise ConfigError(f"drain_delay_s={self.drain_delay_s} and drain_s={self.drain_s} must not be negative.")


@final
class Server:
    """Both front ends.

    Args:
        front: the engine, and what stands before it.
        config: where and how.
        tasks, pages: as in `RestApp`.

    Attributes:
        rest_port, grpc_port: where it listens, once started.
    """

    def __init__(
        self,
        front: Front,
        config: ServerConfig | None = None,
        *,
        tasks: Mapping[str, TaskRoute] | None = None,
        pages: Mapping[str, tuple[str, bytes]] | None = None,
    ) -> None:
        self.front = front
        self.config = config or ServerConfig()
        self.rest_port: int | None = None
        self.grpc_port: int | None = None
        self._app = RestApp(front, tasks, pages)
        self._listener: Listener | None = None
        self._grpc: Any = None
        self._asked_to_end = asyncio.Event()
        self._hurried = asyncio.Event()

    async def start(self) -> None:
        """Listen; raises ConfigError where an address or a certificate cannot be used."""
        config = self.config
        if config.host not in LOOPBACK and not self.front.keys:
            say(logging.WARNING, "other machines may call without a key", host=config.host)
        if config.rest_port is not None:
            self._listener = Listener(self._app, config.tls.context() if config.tls else None)
            self.rest_port = await self._listener.start(config.host, config.rest_port)
        if config.grpc_port is not None:
            # a server without it needs no gRPC
            from trilevel.serving.grpc_server import GrpcServer

            self._grpc = GrpcServer(self.front, config.tls)
            self.grpc_port = await self._grpc.start(config.host, config.grpc_port)
        say(logging.INFO, "started", host=config.host, rest_port=self.rest_port, grpc_port=self.grpc_port)

    async def serve(self) -> None:
        """Start, wait for SIGTERM or SIGINT (or `end`), and drain; a second signal ends at once."""
        with self._signals():
            await self.start()
            # what lives until the end need not be looked through again and again
            gc.collect()
            gc.freeze()
            await self._asked_to_end.wait()
            await self.stop()

    def end(self) -> None:
        """Ask a server that serves to drain and end; asked twice it ends at once."""
        (self._hurried if self._asked_to_end.is_set() else self._asked_to_end).set()

    async def stop(self) -> None:
        """Say not ready, take nothing new after the delay, answer what was accepted, within `drain_s`."""
        self.front.is_draining = True
        say(logging.INFO, "draining", delay_s=self.config.drain_delay_s, at_most_s=self.config.drain_s)
        await self._wait(self.config.drain_delay_s)
        drained: asyncio.Future[Any] = asyncio.gather(*self._stops(self.config.drain_s))
        hurried: asyncio.Future[Any] = asyncio.ensure_future(self._hurried.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        if hurried.done():
            await asyncio.gather(*self._stops(0))
        hurried.cancel()
        await drained
        say(logging.INFO, "ended")

    def _stops(self, timeout_s: float) -> Iterator[Coroutine[Any, Any, object]]:
        if self._listener is not None:
            yield self._listener.stop(timeout_s)
        if self._grpc is not None:
            yield self._grpc.stop(timeout_s)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurried.wait(), seconds)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        try:
            for number in _SIGNALS:
                loop.add_signal_handler(number, self.end)
        except (NotImplementedError, RuntimeError, ValueError):
            # Windows, or a thread that is not the first: whoever runs the server there calls `end`
            yield
            return
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run to the end in an event loop: uvloop's where it is installed, else Python's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    result: _T = uvloop.run(work)
    return result
