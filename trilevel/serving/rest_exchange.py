"""One request and its reply over ASGI: headers, a body that ends at its limits, a client that may go away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any, NamedTuple, Protocol, TypeVar, final
from urllib.parse import unquote

import orjson

from trilevel.errors import InputError
from trilevel.serving.front import Call, Front
from trilevel.serving.requests import OverloadedError
from trilevel.serving.status import MediaError, TooLargeError, TooSlowError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]
TIMEOUT_HEADER = b"x-request-timeout-ms"
ID_HEADER = b"x-request-id"
JSON = (b"content-type", b"application/json")
WATCHER = "trilevel.watcher"
"""Where the scope of ASGI has the connection, if it is ours."""
_DAY_MS = 86_400_000
_LINGER_S = 2.0
_T = TypeVar("_T")


class Watcher(Protocol):
    """A connection that says itself when its client goes away, which costs less than a task that waits for it."""

    def has_whole(self, scope: Message) -> bool:
        """Whether the body of this request has arrived, so that nobody need wait for it."""
        ...

    def watch(self, go: Callable[[], None]) -> None:
        """Call `go` when the client goes away; one at a time."""
        ...

    def unwatch(self) -> None:
        """Call nobody."""
        ...


class GoneError(Exception):
    """The client went away: nobody is left to answer."""


class Response(NamedTuple):
    """What goes back."""

    status: int
    body: bytes
    headers: tuple[Header, ...] = (JSON,)


def json_response(value: object, status: int = 200, headers: Iterable[Header] = ()) -> Response:
    """A value as JSON; NumPy's arrays and numbers too."""
    return Response(status, orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), (JSON, *headers))


@final
class Exchange:
    """One request and its reply.

    Attributes:
        path, parts, query: of the address; the path and its parts between slashes decoded.
        headers: by name in lower case; of those sent twice the last.
    """

    def __init__(self, front: Front, call: Call, scope: Message, receive: Receive, send: Send) -> None:
        self.front = front
        self.call = call
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        # a slash inside a name comes as %2F, which the decoded path no longer tells from others
        raw: bytes = scope.get("raw_path") or b""
        self.parts = [unquote(part) for part in raw.decode("ascii").split("/")] if b"%" in raw else self.path.split("/")
        self.query: str = scope["query_string"].decode("latin-1")
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._scope = scope
        self._receive = receive
        self._send = send
        self._is_gone = False
        self._watcher: Watcher | None = scope.get(WATCHER)
        self._pending = 0
        # of a request without a body its one empty message is still to come, and does no harm
        self._has_body = self.headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in self.headers

    def text(self, name: bytes) -> str:
        """A header, empty where it was not sent."""
        return self.headers.get(name, b"").decode("latin-1")

    def timeout_s(self) -> float | None:
        """The time that the client gives; raises InputError where it is no whole number of milliseconds."""
        given = self.headers.get(TIMEOUT_HEADER)
        if given is None:
            return None
        if not given.isdigit() or not 0 < int(given[:12]) <= _DAY_MS:
            raise InputError(f"X-Request-Timeout-Ms must be a whole number from 1 to {_DAY_MS}.")
        return int(given) / 1000

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            TooLargeError: it is above the limit, said or sent.
            TooSlowError: it took too long.
            OverloadedError: too many bodies are held already.
            GoneError: the client went away before its end.
        """
        limits = self.front.limits
        if self.headers.get(b"content-encoding", b"identity") != b"identity":
            raise MediaError("Content-Encoding is not read; send the body as it is.")
        self._check_size(int(self.headers.get(b"content-length", b"0")))
        if self._watcher is not None and self._watcher.has_whole(self._scope):
            return await self._whole()
        try:
            with self.front.deadlines.within(limits.body_s):
                return await self._whole()
        except TimeoutError as error:
            raise TooSlowError(f"the body took more than {limits.body_s:g} s; send it faster, or in parts.") from error

    async def unless_gone(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which is cancelled when the client goes away; raises GoneError then."""
        task = asyncio.current_task()
        assert task is not None
        stop = self._watching(task)
        try:
            return await work
        except asyncio.CancelledError:
            if not self._is_gone:
                raise
            task.uncancel()
            raise GoneError from None
        finally:
            stop()

    async def respond(self, response: Response) -> None:
        """Send a reply; of a body that was not read the rest is thrown away, so that the client sees the reply."""
        headers = [*response.headers, (b"content-length", b"%d" % len(response.body))]
        headers.append((ID_HEADER, self.call.id.encode("ascii", "replace")))
        if self._has_body or self.front.is_draining:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": response.body, "more_body": self._has_body})
        if self._has_body:
            await self._linger()
            await self._send({"type": "http.response.body", "body": b""})

    def close(self) -> None:
        """Give back what the body took."""
        self.front.pending_bytes -= self._pending

    def _check_size(self, size: int) -> None:
        limit = self.front.limits.body_bytes
        if size > limit:
            raise TooLargeError(f"the body has more than {limit} bytes, which is the most that is taken. Send less.")

    async def _whole(self) -> bytes:
        chunks, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._has_body = False
                raise GoneError
            chunk = message.get("body", b"")
            size += len(chunk)
            self._check_size(size)
            self._hold(len(chunk))
            chunks.append(chunk)
            if not message.get("more_body", False):
                self._has_body = False
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _hold(self, size: int) -> None:
        self._pending += size
        self.front.pending_bytes += size
        if self.front.pending_bytes > self.front.limits.pending_bytes:
            raise OverloadedError("too many bodies are being read at once; send this one later.", retry_after_s=1.0)

    def _watching(self, task: asyncio.Task[Any]) -> Callable[[], object]:
        def go() -> None:
            self._is_gone = True
            task.cancel()

        if self._watcher is not None:
            self._watcher.watch(go)
            return self._watcher.unwatch
        return asyncio.ensure_future(self._watch(go)).cancel

    async def _watch(self, go: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        go()

    async def _linger(self) -> None:
        try:
            with self.front.deadlines.within(_LINGER_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return
