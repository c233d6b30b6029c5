"""The REST front end: an ASGI application with the routes of the Open Inference Protocol and of tasks."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, final
from urllib.parse import parse_qsl

from trilevel.serving import metrics, rest_routes
from trilevel.serving.front import TRACE_HEADERS, Call, Front, new_id
from trilevel.serving.openapi import document, page
from trilevel.serving.protocol.json_infer import check_id
from trilevel.serving.requests import OverloadedError, UnavailableError
from trilevel.serving.rest_exchange import (
    ID_HEADER,
    Exchange,
    GoneError,
    Header,
    Message,
    Receive,
    Response,
    Send,
    json_response,
)
from trilevel.serving.status import (
    KeyRefusedError,
    MediaError,
    MethodError,
    OriginError,
    UnknownRouteError,
    message_of,
    status_of,
)
from trilevel.serving.tasks import TaskRoute, Upload

Handler = Callable[[Exchange], Awaitable[Response]]
_HTML = (b"content-type", b"text/html; charset=utf-8")
_SAFE = (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'")
_PAGE_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_PAGE: tuple[Header, ...] = (
    (b"content-security-policy", _PAGE_POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    # a server of another version must not meet the scripts of this one
    (b"cache-control", b"no-cache"),
)
"""Pages run their own scripts alone, load nothing of other hosts, and stand in no frame."""
_WAITING_TASKS = 256
_OF_MODEL: dict[str, tuple[str, str, Callable[..., Awaitable[Response]]]] = {
    "": ("model", "GET", rest_routes.model_metadata),
    "ready": ("model ready", "GET", rest_routes.model_ready),
    "infer": ("infer", "POST", rest_routes.infer),
}
"""By what follows a model's name: how it is called in the log, its method and handler."""


class Route(NamedTuple):
    """Where a request goes; open ones need no key."""

    name: str
    method: str
    handler: Handler
    is_open: bool = False


@final
class RestApp:
    """The application; any ASGI server runs it, `trilevel.serving.server` with the time limits of connections.

    Args:
        front: the engine, and what stands before it.
        tasks: routes under `/v1/`, by name.
        pages: further pages, by path, each its content type and content; they need no key.
    """

    def __init__(
        self,
        front: Front,
        tasks: Mapping[str, TaskRoute] | None = None,
        pages: Mapping[str, tuple[str, bytes]] | None = None,
    ) -> None:
        self.front = front
        self._tasks = dict(tasks or {})
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="task")
        self._waiting = 0
        described = document(self._tasks)
        self._fixed = {
            "/v2": Route("metadata", "GET", rest_routes.server_metadata),
            "/v2/health/live": Route("live", "GET", rest_routes.live, is_open=True),
            "/v2/health/ready": Route("ready", "GET", rest_routes.ready, is_open=True),
            "/v2/repository/index": Route("index", "POST", rest_routes.index),
            "/metrics": Route("metrics", "GET", self._metrics),
            "/openapi.json": _page("openapi", json_response(described)),
            "/docs": _page("docs", Response(200, page(described), (_HTML, _SAFE))),
        }
        self._fixed |= {
            f"/v1/{name}": Route(name, "POST", self._task_handler(task)) for name, task in self._tasks.items()
        }
        for path, (kind, content) in (pages or {}).items():
            self._fixed[path] = _page("page", Response(200, content, ((b"content-type", kind.encode()), *_PAGE)))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        call = Call(protocol="rest", route="")
        exchange = Exchange(self.front, call, scope, receive, send)
        self.front.in_flight += 1
        try:
            response, error = await self._answer(exchange)
            await exchange.respond(response)
            self.front.finished(call, str(response.status), error)
        except GoneError:
            # 499, as nginx says
            self.front.gone(call, "499")
        finally:
            self.front.in_flight -= 1
            exchange.close()

    async def _answer(self, exchange: Exchange) -> tuple[Response, Exception | None]:
        call = exchange.call
        try:
            call.id = new_id()
            route = self._admit(exchange)
            return await route.handler(exchange), None
        except GoneError:
            raise
        except asyncio.CancelledError:
            if not self.front.is_draining:
                raise
            cut_off = UnavailableError("the server ends, and its time for that is over; ask another one.")
            return _refusal(cut_off, call.id), cut_off
        # whatever went wrong, the client gets an answer
        except Exception as error:
            return _refusal(error, call.id), error

    def _admit(self, exchange: Exchange) -> Route:
        call = exchange.call
        if given := exchange.text(ID_HEADER):
            call.id = check_id(given, "X-Request-Id")
        route = self._route(exchange.path, exchange.parts)
        call.route = route.name
        if self.front.tracer is not None and not route.is_open:
            call.span = self.front.tracer.begin(call, {name: exchange.text(name.encode()) for name in TRACE_HEADERS})
        if exchange.method != route.method and not (exchange.method == "HEAD" and route.method == "GET"):
            raise MethodError(f"{exchange.path[:80]} takes {route.method}; {exchange.method} was sent.", route.method)
        _check_origin(exchange)
        if not route.is_open:
            call.key = self.front.keys.check(exchange.text(b"authorization"))
        call.timeout_s = exchange.timeout_s()
        return route

    def _route(self, path: str, parts: list[str]) -> Route:
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed
        route = _model_route(parts)
        if route is None:
            raise UnknownRouteError(f"nothing is served at {path[:80]}; /docs lists what is.")
        return route

    async def _metrics(self, exchange: Exchange) -> Response:
        return Response(200, self.front.metrics.page(), ((b"content-type", metrics.CONTENT_TYPE.encode()),))

    def _task_handler(self, task: TaskRoute) -> Handler:
        async def handle(exchange: Exchange) -> Response:
            return await self._task(task, exchange)

        return handle

    async def _task(self, task: TaskRoute, exchange: Exchange) -> Response:
        kind = exchange.text(b"content-type").partition(";")[0].strip().lower()
        if kind not in task.content_types:
            raise MediaError(f"Content-Type {kind[:80]!r} is not read here; send {' or '.join(task.content_types)}.")
        body, call = await exchange.body(), exchange.call
        deadline = self.front.deadline(call)
        asked = dict(parse_qsl(exchange.query, keep_blank_values=True, errors="replace"))
        upload = Upload(body=body, content_type=kind, parameters=asked, id=call.id, deadline=deadline)
        # as many as wait for a thread are bounded, like everything that waits
        if self._waiting >= _WAITING_TASKS:
            raise OverloadedError("too many texts are being read at once; send this one later.", retry_after_s=1.0)
        self._waiting += 1
        try:
            return await exchange.unless_gone(self._through(task, upload, call))
        finally:
            self._waiting -= 1

    async def _through(self, task: TaskRoute, upload: Upload, call: Call) -> Response:
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._threads, task.prepare, upload)
        call.model = self.front.engine.model(prepared.request.model, prepared.request.version).name
        reply = await self.front.answer(call, prepared.request)
        return json_response(await loop.run_in_executor(self._threads, prepared.answer, reply))


def _model_route(parts: list[str]) -> Route | None:
    match parts:
        case ["", "v2", "models", name, *rest] if name:
            version = ""
            if len(rest) >= 2 and rest[0] == "versions" and rest[1]:
                version, rest = rest[1], rest[2:]
            found = _OF_MODEL.get("/".join(rest))
            return found and Route(found[0], found[1], functools.partial(found[2], name=name, version=version))
        case ["", "v2", "repository", "models", name, "load"]:
            return Route("load", "POST", functools.partial(rest_routes.load, name=name))
        case ["", "v2", "repository", "models", name, "unload"]:
            return Route("unload", "POST", functools.partial(rest_routes.unload, name=name))
    return None


def _page(name: str, response: Response) -> Route:
    async def handle(exchange: Exchange) -> Response:
        return response

    return Route(name, "GET", handle, is_open=True)


def _check_origin(exchange: Exchange) -> None:
    # a page of another site may post to a server on loopback; its own pages and programs are let through
    origin = exchange.text(b"origin")
    if origin and origin.partition("://")[2] != exchange.text(b"host"):
        raise OriginError(f"pages of {origin[:80]!r} may not call this server.")


def _refusal(error: Exception, request_id: str) -> Response:
    headers: list[Header] = []
    if isinstance(error, OverloadedError | UnavailableError):
        seconds = error.retry_after_s if isinstance(error, OverloadedError) else 1.0
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(seconds))))
        headers.append((b"retry-after-ms", b"%d" % max(1, math.ceil(seconds * 1000))))
    if isinstance(error, MethodError):
        headers.append((b"allow", error.allowed.encode()))
    if isinstance(error, KeyRefusedError):
        headers.append((b"www-authenticate", b"Bearer"))
    return json_response({"error": message_of(error, request_id)}, status_of(error).http, headers)
