"""What hostile, slow and too many clients cannot do to the REST front end."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import pytest

from tests.serving.fake_engine import FakeEngine, infer_body, looped, until
from tests.serving.rest_client import INFER, connect, head, raw, rest, until_its_end
from trilevel.errors import ConfigError
from trilevel.serving.limits import Limits


@looped
async def test_large_bodies_are_refused_before_they_are_read() -> None:
    engine = FakeEngine()
    async with rest(engine, limits=Limits(body_bytes=100_000)) as (_, server):
        # said, and never sent
        got, _ = await raw(server, head(content_length=1 << 30))
        assert got.startswith(b"HTTP/1.1 413 ")
        # sent without saying so, as 1 GB would be
        reader, writer = await connect(server)
        writer.write(head(transfer_encoding="chunked"))
        chunk, sent = b"10000\r\n" + b" " * 65536 + b"\r\n", 0
        while not writer.is_closing() and sent < 1 << 30:
            try:
                writer.write(chunk)
                await writer.drain()
                sent += len(chunk)
                async with asyncio.timeout(0.001):
                    if (await reader.readline()).startswith(b"HTTP/1.1 413 "):
                        break
            except TimeoutError:
                continue
        assert sent < 50 << 20
        writer.transport.abort()
        await until(lambda: server.front.pending_bytes == 0)
        assert not engine.requests


@looped
async def test_a_limit_for_all_bodies_together() -> None:
    async with rest(FakeEngine(), limits=Limits(pending_bytes=3000)) as (client, server):
        _, writer = await connect(server)
        writer.write(head(content_length=4000) + b"x" * 2500)
        await until(lambda: server.front.pending_bytes == 2500)
        got = await client.post(INFER, json=infer_body(rows=200))
        assert (got.status_code, got.headers["retry-after"]) == (429, "1")
        writer.close()
        await until(lambda: server.front.pending_bytes == 0)
        assert (await client.post(INFER, json=infer_body(rows=200))).status_code == 200


@looped
async def test_encodings_that_are_not_read() -> None:
    async with rest(FakeEngine()) as (client, _):
        got = await client.post(INFER, content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        assert got.status_code == 415


@looped
async def test_slow_clients() -> None:
    engine = FakeEngine()
    limits = Limits(header_s=0.3, body_s=0.3, idle_s=0.5)
    async with rest(engine, limits=limits) as (client, server):

        async def drips(first: bytes, drop: bytes) -> bytes:
            reader, writer = await connect(server)
            writer.write(first)
            ended = asyncio.ensure_future(until_its_end(reader))
            while not ended.done():
                writer.write(drop)
                await asyncio.sleep(0.02)
            writer.close()
            return ended.result()

        started = time.monotonic()
        loris, body, newlines, idle = await asyncio.gather(
            drips(b"POST / HTTP/1.1\r\n", b"a: b\r\n"),
            drips(head(content_length=5000), b"x"),
            drips(b"\r\n", b"\r\n"),
            raw(server, b""),
        )
        assert loris.startswith(b"HTTP/1.1 408 ")
        assert body.startswith(b"HTTP/1.1 408 ")
        assert newlines.startswith(b"HTTP/1.1 408 ")
        assert idle[0] == b""
        # the rest of a slow body is thrown away for a while, for the client to see the answer
        assert time.monotonic() - started < 5
        got, seconds = await raw(server, head("/v2", "GET"))
        assert (got.startswith(b"HTTP/1.1 200 "), 0.4 < seconds < 2) == (True, True)
        assert (await client.get("/v2/health/live")).status_code == 200


@looped
async def test_a_client_that_reads_nothing() -> None:
    async with rest(FakeEngine(), limits=Limits(write_s=0.3)) as (client, server):
        rows = 4096
        ids = {"name": "ids", "datatype": "INT64", "shape": [rows, 300], "data": [[7] * 300] * rows}
        others = [{"name": "text", "datatype": "BYTES", "shape": [rows], "data": [""] * rows}]
        others.append({"name": "is", "datatype": "BOOL", "shape": [rows], "data": [True] * rows})
        sent = json.dumps({"inputs": [ids, *others], "parameters": {"binary_data_output": True}}).encode()
        _, writer = await connect(server)
        writer.write(head("/v2/models/texts/infer", content_length=len(sent)) + sent)
        await until(lambda: b'status="200"' in server.front.metrics.page())
        listener: Any = server._listener
        await until(lambda: not listener._state.connections)
        assert (await client.get("/v2/health/live")).status_code == 200
        writer.close()


@pytest.mark.parametrize("then_eof", [False, True], ids=["gone", "half_closed"])
@looped
async def test_clients_that_go_away(then_eof: bool) -> None:
    engine = FakeEngine(delay_s=10)
    async with rest(engine) as (client, server):
        sent = json.dumps(infer_body()).encode()
        _, writer = await connect(server)
        writer.write(head(content_length=len(sent)) + sent)
        await until(lambda: engine.started == 1)
        if then_eof:
            writer.write_eof()
        else:
            writer.transport.abort()
        await until(lambda: engine.cancelled == 1)
        # and in the middle of a body
        _, other = await connect(server)
        other.write(head(content_length=5000) + b"x" * 100)
        await until(lambda: server.front.pending_bytes == 100)
        other.transport.abort()
        await until(lambda: server.front.pending_bytes == 0)
        assert (
            b'trilevel_requests_total{model="double",protocol="rest",status="499"} 1.0' in server.front.metrics.page()
        )
        engine.delay_s = 0
        assert (await client.post(INFER, json=infer_body())).status_code == 200
        writer.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10, 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\na: " + b"b" * 100_000, 431),
        (b"GET /" + b"b" * 100_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000, 431),
        (head(content_length="x"), 400),
        (head(content_length="-1"), 400),
        (head(content_length=5, transfer_encoding="chunked") + b"0\r\n\r\n", 400),
        (head(transfer_encoding="chunked") + b"zz\r\n", 400),
        (head("/v2", "GET", connection="upgrade", upgrade="h2c"), 200),
        (head(content_length=2, inference_header_content_length="x", connection="close") + b"{}", 400),
        (head(content_length=2, inference_header_content_length=9, connection="close") + b"{}", 400),
        (head(content_length=2, expect="100-continue", connection="close") + b"{}", 100),
    ],
)
@looped
async def test_bytes_that_are_no_request(sent: bytes, status: int) -> None:
    async with rest(FakeEngine(), limits=Limits(idle_s=1)) as (client, server):
        got, _ = await raw(server, sent)
        assert got.startswith(b"HTTP/1.1 %d " % status), got[:200]
        assert status < 400 or b'{"error":' in got
        assert (await client.get("/v2/health/live")).status_code == 200


@looped
async def test_requests_sent_at_once_are_answered_in_their_order() -> None:
    async with rest(FakeEngine(delay_s=0.02)) as (_, server):
        sent = [json.dumps(infer_body() | {"id": str(number)}).encode() for number in range(7)]
        one = b"".join(head(content_length=len(body)) + body for body in sent)
        got, _ = await raw(server, one + head("/v2", "GET", connection="close"))
        assert re.findall(rb'"id":"(\d)"', got) == [b"%d" % number for number in range(7)]


@looped
async def test_thousands_of_idle_connections() -> None:
    async with rest(FakeEngine()) as (client, server):
        connections: list[Any] = []
        for _ in range(20):
            opened = [connect(server) for _ in range(100)]
            connections += await asyncio.gather(*opened)
        started = time.monotonic()
        for _ in range(20):
            assert (await client.post(INFER, json=infer_body())).status_code == 200
        assert (time.monotonic() - started) / 20 < 0.1
        for _, writer in connections:
            writer.transport.abort()
        await until(lambda: len(server._listener._state.connections) <= 1)  # type: ignore[union-attr]


@looped
async def test_more_connections_than_allowed() -> None:
    async with rest(FakeEngine(), limits=Limits(connections=5)) as (_, server):
        held = [await connect(server) for _ in range(5)]
        got, _ = await raw(server, b"")
        assert got.startswith(b"HTTP/1.1 503 ")
        held[0][1].close()
        await until(lambda: len(server._listener._state.connections) < 5)  # type: ignore[union-attr]
        got, _ = await raw(server, head("/v2", "GET", connection="close"))
        assert got.startswith(b"HTTP/1.1 200 ")
        for _, writer in held:
            writer.close()


def test_limits_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="body_bytes=0 must be a number above 0"):
        Limits(body_bytes=0)
