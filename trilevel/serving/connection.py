"""Connections over HTTP that end when a client is too slow, sends too much before its request, or too many are open."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable
from email.utils import formatdate
from typing import final

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from trilevel.errors import ConfigError
from trilevel.serving.backlog import let_in_the_last
from trilevel.serving.limits import Limits
from trilevel.serving.rest import RestApp
from trilevel.serving.rest_exchange import WATCHER, Message

_POLL_S = 0.02
_SPARE_FILES = 512


@final
class Connection(HttpToolsProtocol):
    """uvicorn's connection, which waits for ever for a first line, for headers and for clients that read nothing."""

    def __init__(self, config: uvicorn.Config, state: ServerState, limits: Limits, most: int) -> None:
        super().__init__(config, state, {})
        self._limits = limits
        self._most = most
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._is_in_head = False
        self._go: Callable[[], None] | None = None

    def has_whole(self, scope: Message) -> bool:
        """As of `Watcher`; once a later request has begun, this one had come."""
        return self.cycle.scope is not scope or not self.cycle.more_body

    def watch(self, go: Callable[[], None]) -> None:
        """As of `Watcher`; reads on, for otherwise nobody would notice."""
        self._go = go
        self.flow.resume_reading()
        if self.transport.is_closing():
            go()

    def unwatch(self) -> None:
        """As of `Watcher`."""
        self._go = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._refuse(503, f"more than {self._most} connections are open; come back later.")
            return
        self._head_timer = self.loop.call_later(self._limits.idle_s, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        self._stop_head_timer()
        self.resume_writing()
        # uvicorn stops its own for some errors only
        self._unset_keepalive_if_required()
        if self._go is not None:
            self._go()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and watch whether a request begins and does not go on."""
        super().data_received(data)
        if self.transport.is_closing() or not self._waits_for_head():
            return
        self._head_bytes += len(data)
        if self._head_bytes > self._limits.header_bytes:
            self._refuse(431, f"the first line and headers have more than {self._limits.header_bytes} bytes.")
        elif self._head_bytes == len(data):
            self._stop_head_timer()
            self._head_timer = self.loop.call_later(self._limits.header_s, self._end)

    def on_message_begin(self) -> None:
        """A first line begins."""
        super().on_message_begin()
        self.scope[WATCHER] = self  # type: ignore[literal-required]
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        """The request has begun; its body has a limit of its own."""
        self._is_in_head = False
        self._head_bytes = 0
        self._stop_head_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the form of all errors."""
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        """The client reads nothing."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """End a connection between requests; one whose last reply was not read would never close."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def _waits_for_head(self) -> bool:
        return self._is_in_head or self.cycle is None or self.cycle.response_complete

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end(self) -> None:
        if self._head_bytes:
            self._refuse(408, f"the first line and headers took more than {self._limits.header_s:g} s.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        self._stop_head_timer()
        body = orjson.dumps({"error": message})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


@final
class Listener:
    """Takes connections for an application, and lets them end."""

    def __init__(self, app: RestApp, tls: ssl.SSLContext | None = None) -> None:
        self._limits = app.front.limits
        self._tls = tls
        self._state = ServerState()
        self._config = uvicorn.Config(
            app,
            http=HttpToolsProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            # what a proxy says of its clients is used nowhere, and anyone may say it
            proxy_headers=False,
            # longer than the idle limit of common load balancers, so that they close first
            timeout_keep_alive=max(1, int(self._limits.idle_s)),
        )
        self._config.load()
        self._most = open_files(self._limits.connections)
        self._server: asyncio.Server | None = None
        self._clock: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, which 0 leaves to the system; raises ConfigError where the address cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._connection, host, port, ssl=self._tls, backlog=2048)
        except OSError as error:
            raise ConfigError(f"REST cannot listen at {host}:{port} ({error}); choose another address.") from error
        self._tick()
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    async def stop(self, timeout_s: float) -> int:
        """Take no connections, end idle ones, wait for requests; the number of requests cut off after `timeout_s`."""
        if self._server is None:
            return 0
        await let_in_the_last(self._server.sockets or ())
        self._server.close()
        if self._clock is not None:
            self._clock.cancel()
        for connection in list(self._state.connections):
            connection.shutdown()
        ends = asyncio.get_running_loop().time() + timeout_s
        while (self._state.tasks or self._state.connections) and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(_POLL_S)
        cut_off = list(self._state.tasks)
        for task in cut_off:
            task.cancel()
        await asyncio.gather(*cut_off, return_exceptions=True)
        for connection in list(self._state.connections):
            connection.transport.abort()
        return len(cut_off)

    def _tick(self) -> None:
        # every reply has a date, which changes once a second
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._clock = asyncio.get_running_loop().call_later(1, self._tick)

    def _connection(self) -> asyncio.Protocol:
        return Connection(self._config, self._state, self._limits, self._most)


def open_files(connections: int) -> int:
    """How many connections may be open, after asking the system for as many files; Windows has no limit."""
    if sys.platform == "win32":
        return connections
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _SPARE_FILES
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == unlimited else min(connections, max(16, soft - _SPARE_FILES))
