"""The gRPC front end: the same answers and refusals as REST, by gRPC's own means."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest

from tests.serving.fake_engine import FakeEngine, looped, served, until
from trilevel.errors import ArtifactError, ConfigError, InputError
from trilevel.serving.front import Front
from trilevel.serving.grpc_methods import SERVICE
from trilevel.serving.keys import Keys, new_key
from trilevel.serving.limits import Limits
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.requests import DeadlineError, OverloadedError, UnavailableError, UnknownModelError, WorkerError
from trilevel.serving.server import Server, ServerConfig

Ask = Callable[..., Any]


@asynccontextmanager
async def rpc(engine: FakeEngine, **given: Any) -> AsyncIterator[tuple[Ask, Server]]:
    """What asks a method by its name, and the server."""
    limits = given.pop("limits", None) or Limits()
    front = Front(engine, limits=limits, keys=given.pop("keys", None), timeout_s=5.0)
    async with (
        served(engine, front=front, rest_port=None, grpc_port=0) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):

        def ask(method: str, sent: Any, **how: Any) -> Any:
            kind = getattr(messages, f"{method}Response")
            call = channel.unary_unary(f"/{SERVICE}/{method}", response_deserializer=kind.FromString)
            return call(sent if isinstance(sent, bytes) else sent.SerializeToString(), **how)

        yield ask, server


def request(model: str = "double", rows: int = 2, **changes: Any) -> Any:
    made = messages.ModelInferRequest(model_name=model, id="7", raw_input_contents=[bytes(rows * 12)])
    made.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [rows, 3], **changes})
    return made


async def refused(call: Any) -> tuple[str, str, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, caught.value.details(), dict(caught.value.trailing_metadata() or ())


@looped
async def test_infer() -> None:
    engine = FakeEngine()
    async with rpc(engine) as (ask, _):
        sent = request()
        sent.raw_input_contents[0] = struct.pack("<6f", *range(6))
        sent.outputs.add(name="sum")
        sent.outputs.add(name="y")
        sent.parameters["max_loss"].double_param = 0.25
        sent.parameters["explain"].bool_param = True
        got = await ask("ModelInfer", sent)
        assert [one.name for one in got.outputs] == ["sum", "y"]
        assert np.frombuffer(got.raw_output_contents[0]).tolist() == [3.0, 12.0]
        assert (got.model_name, got.model_version, got.id) == ("double", "2", "7")
        assert got.parameters["paths"].string_param == "int8/2,float32/6"
        assert got.parameters["explanations"].string_param == '[{"row":0},{"row":1}]'
        assert (engine.requests[0].id, engine.requests[0].max_loss) == ("7", 0.25)


@looped
async def test_health_metadata_and_repository() -> None:
    engine = FakeEngine()
    async with rpc(engine) as (ask, server):
        assert (await ask("ServerLive", messages.ServerLiveRequest())).live
        assert (await ask("ServerReady", messages.ServerReadyRequest())).ready
        assert (await ask("ModelReady", messages.ModelReadyRequest(name="double", version="1"))).ready
        assert (await ask("ServerMetadata", messages.ServerMetadataRequest())).name == "trilevel"
        said = await ask("ModelMetadata", messages.ModelMetadataRequest(name="double"))
        assert (list(said.versions), said.inputs[0].datatype, list(said.inputs[0].shape)) == (
            ["1", "2"],
            "FP32",
            [-1, 3],
        )
        assert len((await ask("RepositoryIndex", messages.RepositoryIndexRequest(ready=True))).models) == 3
        load = messages.RepositoryModelLoadRequest(model_name="double")
        assert (await ask("RepositoryModelLoad", load)).isLoaded
        # the first field is where KServe has the model's name
        unload = messages.RepositoryModelUnloadRequest(repository_name="double")
        assert (await ask("RepositoryModelUnload", unload)).model_name == "double"
        assert engine.loads == ["+double", "-double"]
        load.parameters["file:1/model.onnx"].bytes_param = b"\x00"
        assert (await refused(ask("RepositoryModelLoad", load)))[0] == "INVALID_ARGUMENT"
        assert (await refused(ask("RepositoryModelLoad", messages.RepositoryModelLoadRequest())))[0] == "NOT_FOUND"
        engine.is_ready, server.front.is_draining = True, True
        assert not (await ask("ServerReady", messages.ServerReadyRequest())).ready
        assert not (await ask("ModelReady", messages.ModelReadyRequest(name="double"))).ready


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("too odd"), "INVALID_ARGUMENT"),
        (UnknownModelError("none such"), "NOT_FOUND"),
        (ArtifactError("damaged"), "FAILED_PRECONDITION"),
        (OverloadedError("busy", retry_after_s=1.2), "RESOURCE_EXHAUSTED"),
        (WorkerError("it died twice"), "INTERNAL"),
        (UnavailableError("loads"), "UNAVAILABLE"),
        (DeadlineError("late"), "DEADLINE_EXCEEDED"),
        (KeyError("secret"), "INTERNAL"),
    ],
)
@looped
async def test_errors_of_the_engine(error: Exception, code: str) -> None:
    engine = FakeEngine()
    engine.error = error
    async with rpc(engine) as (ask, server):
        got, details, trailer = await refused(ask("ModelInfer", request(), metadata=[("x-request-id", "abc")]))
        assert got == code
        assert details == (
            "the server failed; its log says why beside request abc." if "secret" in str(error) else str(error)
        )
        if code == "RESOURCE_EXHAUSTED":
            assert (trailer["retry-after"], trailer["grpc-retry-pushback-ms"]) == ("2", "1200")
        line = f'trilevel_requests_total{{model="double",protocol="grpc",status="{code}"}} 1.0'
        assert line in server.front.metrics.page().decode()


@pytest.mark.parametrize(
    ("sent", "code", "message"),
    [
        (b"\xff" * 9, "INVALID_ARGUMENT", "9 bytes that were sent are no ModelInferRequest"),
        (b"\x0a\x01\xff", "INVALID_ARGUMENT", "are no ModelInferRequest"),
        (b"", "INVALID_ARGUMENT", "inputs is empty"),
        (request("none"), "NOT_FOUND", "no model 'none'"),
        (request(name="z"), "INVALID_ARGUMENT", "has the inputs x; z were sent"),
        (request(datatype="FP64"), "INVALID_ARGUMENT", "24 bytes were sent; FP64 of shape"),
        (request(shape=[3, 2]), "INVALID_ARGUMENT", "has the shape"),
        (request(shape=[2, 2**40]), "INVALID_ARGUMENT", "24 bytes were sent"),
        (request(rows=10_000), "RESOURCE_EXHAUSTED", "larger than max"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
@looped
async def test_what_is_wrong_is_the_clients_fault(sent: Any, code: str, message: str) -> None:
    engine = FakeEngine()
    async with rpc(engine, limits=Limits(body_bytes=50_000)) as (ask, _):
        got, details, _ = await refused(ask("ModelInfer", sent))
        assert (got, message in details) == (code, True), details
        assert (await ask("ServerLive", messages.ServerLiveRequest())).live
        assert not engine.requests


@looped
async def test_deadlines() -> None:
    engine = FakeEngine(delay_s=5)
    async with rpc(engine) as (ask, _):
        started = time.monotonic()
        assert (await refused(ask("ModelInfer", request(), timeout=0.1)))[0] == "DEADLINE_EXCEEDED"
        deadline = engine.requests[0].deadline
        assert deadline is not None
        assert deadline - started == pytest.approx(0.1, abs=0.1)
        sent = request()
        sent.parameters["timeout"].int64_param = 50_000
        code, details, _ = await refused(ask("ModelInfer", sent))
        assert (code, "the deadline passed" in details) == ("DEADLINE_EXCEEDED", True)
        await until(lambda: engine.cancelled == 2)
        assert time.monotonic() - started < 2


@looped
async def test_clients_that_cancel() -> None:
    engine = FakeEngine(delay_s=5)
    async with rpc(engine) as (ask, server):
        call = ask("ModelInfer", request())
        asked = asyncio.ensure_future(refused(call))
        await until(lambda: engine.started == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await until(lambda: engine.cancelled == 1)
        assert b'protocol="grpc",status="CANCELLED"} 1.0' in server.front.metrics.page()


@looped
async def test_keys() -> None:
    key, line = new_key("alice")
    keys = Keys({line.split()[0].removeprefix("sha256:"): "alice"})
    async with rpc(FakeEngine(), keys=keys) as (ask, _):
        assert (await ask("ServerLive", messages.ServerLiveRequest())).live
        for metadata in ((), (("authorization", f"Bearer {key}x"),), (("authorization", key),)):
            for method, sent in (("ModelInfer", request()), ("ServerMetadata", messages.ServerMetadataRequest())):
                assert (await refused(ask(method, sent, metadata=metadata)))[0] == "UNAUTHENTICATED"
        own = (("authorization", f"Bearer {key}"),)
        assert (await ask("ModelInfer", request(), metadata=own)).model_name == "double"
        for method, kind in (
            ("RepositoryModelLoad", messages.RepositoryModelLoadRequest),
            ("RepositoryModelUnload", messages.RepositoryModelUnloadRequest),
        ):
            assert (await refused(ask(method, kind(model_name="double"), metadata=own)))[0] == "PERMISSION_DENIED"


@looped
async def test_a_method_that_is_none() -> None:
    async with served(FakeEngine(), rest_port=None, grpc_port=0) as server:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}")
        assert (await refused(channel.unary_unary(f"/{SERVICE}/ModelStatistics")(b"")))[0] == "UNIMPLEMENTED"
        await channel.close()


@looped
async def test_a_port_that_is_taken() -> None:
    async with rpc(FakeEngine()) as (_, server):
        another = Server(server.front, ServerConfig(rest_port=None, grpc_port=server.grpc_port))
        with pytest.raises(ConfigError, match=r"gRPC cannot listen at 127.0.0.1:.*choose another address"):
            await another.start()
