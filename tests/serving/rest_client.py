"""A server on a real socket, and what speaks to it: a client, bare connections, a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import numpy as np

from tests.serving.fake_engine import FakeEngine, served
from trilevel.errors import InputError
from trilevel.serving.front import Front
from trilevel.serving.limits import Limits
from trilevel.serving.requests import (
    Reply,
    Request,
)
from trilevel.serving.server import Server
from trilevel.serving.tasks import Prepared, Upload

OPEN: list[asyncio.StreamWriter] = []
INFER = "/v2/models/double/infer"


@asynccontextmanager
async def rest(engine: FakeEngine, **given: Any) -> AsyncIterator[tuple[httpx2.AsyncClient, Server]]:
    limits = given.pop("limits", None) or Limits()
    front = Front(engine, limits=limits, keys=given.pop("keys", None), timeout_s=given.pop("timeout_s", 5.0))
    async with (
        served(engine, front=front, **given) as server,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.rest_port}", timeout=10) as client,
    ):
        try:
            yield client, server
        finally:
            while OPEN:
                OPEN.pop().transport.abort()
            await asyncio.sleep(0.01)


async def connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that ends with the server at the latest."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.rest_port)
    OPEN.append(writer)
    return reader, writer


async def raw(server: Server, sent: bytes, *, then_eof: bool = False) -> tuple[bytes, float]:
    """What a connection brings after these bytes until it ends, and how long that took."""
    reader, writer = await connect(server)
    started = time.monotonic()
    writer.write(sent)
    if then_eof:
        writer.write_eof()
    got = await reader.read()
    writer.close()
    return got, time.monotonic() - started


def head(path: str = INFER, method: str = "POST", **headers: object) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: a",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def until_its_end(reader: asyncio.StreamReader) -> bytes:
    """All that came, also where the server reset a connection that went on writing."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := await reader.read(4096):
            found += data
    return found


class Lengths:
    """A task that tells how long texts are."""

    summary = "Says how long a text is."
    content_types = ("text/plain", "application/json")
    fields: Mapping[str, Mapping[str, Any]] = {"text": {"type": "string"}, "model": {"type": "string"}}
    content = ("text",)

    def prepare(self, upload: Upload) -> Prepared:
        try:
            text = upload.body.decode() if upload.content_type == "text/plain" else json.loads(upload.body)["text"]
        except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise InputError("send text in UTF-8, or JSON with text.") from error
        inputs = {"x": np.full((1, 3), len(text), np.float32)}
        name = upload.parameters.get("model", "double")
        request = Request(id=upload.id, model=name, inputs=inputs, deadline=upload.deadline)

        def answer(reply: Reply) -> Mapping[str, Any]:
            return {"twice": float(reply.outputs["y"][0, 0]), "path": reply.paths[0], "text": text[:1]}

        return Prepared(request=request, answer=answer)
