"""Traces: which spans a request has, below whose, that they hold nothing that was sent, and that none cost nothing."""

from __future__ import annotations

import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc  # type: ignore[import-untyped]
import httpx2
import pytest

from tests.serving.fake_engine import FakeEngine, infer_body, looped, served
from tests.serving.fake_model import INPUT_ERROR, KILLS, pixels
from tests.serving.test_engine import engine_of
from trilevel.serving.front import Front
from trilevel.serving.grpc_methods import SERVICE
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.server import Server

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from trilevel.serving.tracing import OpenTelemetry, to_collector

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
INFER = "/v2/models/fake/infer"


@asynccontextmanager
async def traced(folder: Path, **behaviour: Any) -> AsyncIterator[tuple[InMemorySpanExporter, Server]]:
    """A server whose spans are kept."""
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    async with engine_of(folder, **behaviour) as engine:
        front = Front(engine, tracer=OpenTelemetry(provider))
        async with served(engine, front=front, grpc_port=0) as server:  # type: ignore[arg-type]
            yield kept, server


def sent(number: int, **how: Any) -> dict[str, Any]:
    data = pixels(number, **how).ravel().tolist()
    return {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": data}]}


def in_order(kept: InMemorySpanExporter) -> list[ReadableSpan]:
    return sorted(kept.get_finished_spans(), key=lambda span: (span.start_time, -(span.end_time or 0)))


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@looped
async def test_a_request_below_its_clients_span(tmp_path: Path) -> None:
    async with traced(tmp_path) as (kept, server), httpx2.AsyncClient() as client:
        url = f"http://127.0.0.1:{server.rest_port}"
        headers = {"traceparent": SAMPLED, "X-Request-Id": "7"}
        got = await client.post(f"{url}{INFER}", json=sent(3, depth=1), headers=headers)
        assert got.status_code == 200
        await client.get(f"{url}/v2/health/ready")
    whole, *parts = in_order(kept)
    assert [span.name for span in parts] == ["receive", "queue", "segment", "segment", "collect", "answer"]
    assert whole.name == "rest infer"
    assert whole.parent is not None
    assert f"{whole.context.trace_id:032x} {whole.parent.span_id:016x}" == f"{TRACE} {PARENT}"
    assert all(span.parent is not None and span.parent.span_id == whole.context.span_id for span in parts)
    said = attributes(whole)
    assert said.pop("trilevel.version") == got.json()["model_version"]
    assert said == {
        "trilevel.request_id": "7",
        "trilevel.status": "200",
        "trilevel.model": "fake",
        "trilevel.rows": 1,
        "trilevel.paths": ("int8/2",),
    }
    assert [attributes(span) for span in parts if span.name == "segment"] == [
        {"trilevel.path": path, "trilevel.batch": 1} for path in ("int8/1", "int8/2")
    ]
    # one after the other, without gaps, from the first byte to the last
    moments = [moment for span in parts for moment in (span.start_time or 0, span.end_time or 0)]
    assert moments == sorted(moments)
    assert moments[1:-1:2] == moments[2::2]
    assert (moments[0], moments[-1]) == (whole.start_time, whole.end_time)


@looped
async def test_grpc_takes_the_same_context(tmp_path: Path) -> None:
    async with (
        traced(tmp_path) as (kept, server),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        request = messages.ModelInferRequest(model_name="fake", raw_input_contents=[pixels(3).tobytes()])
        request.inputs.add(name="pixels", datatype="UINT8", shape=[1, 1, 2, 3])
        ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        await ask(request.SerializeToString(), metadata=(("traceparent", SAMPLED),))
        await channel.unary_unary(f"/{SERVICE}/ServerReady")(b"")
    names = [span.name for span in in_order(kept)]
    assert names == ["grpc infer", "receive", "queue", "segment", "collect", "answer"]
    assert {f"{span.context.trace_id:032x}" for span in in_order(kept)} == {TRACE}


@looped
async def test_what_is_not_sampled_has_no_spans(tmp_path: Path) -> None:
    async with traced(tmp_path) as (kept, server), httpx2.AsyncClient() as client:
        url = f"http://127.0.0.1:{server.rest_port}{INFER}"
        assert (await client.post(url, json=sent(3), headers={"traceparent": SAMPLED[:-1] + "0"})).status_code == 200
    assert kept.get_finished_spans() == ()


@looped
async def test_refusals_are_told_and_nothing_that_was_sent(tmp_path: Path) -> None:
    async with traced(tmp_path) as (kept, server), httpx2.AsyncClient() as client:
        url = f"http://127.0.0.1:{server.rest_port}{INFER}"
        statuses = [(await client.post(url, json=sent(3, wish=wish))).status_code for wish in (INPUT_ERROR, KILLS)]
        statuses.append((await client.post(url, content=b'{"secret":')).status_code)
        assert statuses == [400, 500, 400]
    whole = [span for span in in_order(kept) if span.name == "rest infer"]
    assert [(attributes(span)["error.type"], span.status.status_code.name) for span in whole] == [
        ("InputError", "UNSET"),
        ("WorkerError", "ERROR"),
        ("InputError", "UNSET"),
    ]
    assert {span.name for span in in_order(kept)} == {"rest infer", "receive"}
    text = " ".join(span.to_json() for span in in_order(kept))
    assert "secret" not in text
    assert "pixels" not in text


class Collector(http.server.BaseHTTPRequestHandler):
    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *said: object) -> None:
        pass


@looped
async def test_a_collector_gets_them_at_the_end() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        tracer = to_collector(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        front = Front(FakeEngine(), tracer=tracer)
        async with served(FakeEngine(), front=front) as server, httpx2.AsyncClient() as client:
            await client.post(f"http://127.0.0.1:{server.rest_port}/v2/models/double/infer", json=infer_body())
        tracer.close()
        collector.shutdown()
    (body,) = Collector.bodies
    assert b"rest infer" in body
    assert b"trilevel.request_id" in body


def test_without_traces_nothing_is_imported() -> None:
    code = (
        "import sys; import trilevel.serving.server, trilevel.serving.grpc_server, trilevel.serving.engine;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
