"""Two servers behind nginx and HAProxy, with the configurations that ship: one ends or refuses, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import httpx2
import pytest

from tests.serving.fake_engine import FakeEngine, infer_body, looped, served
from tests.serving.test_grpc import request
from trilevel.bench.serving.process import free_ports
from trilevel.serving.grpc_methods import SERVICE
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.requests import OverloadedError, UnavailableError, WorkerError
from trilevel.serving.server import Server

DEPLOY = Path(__file__).parents[2] / "deploy"
INFER = "/v2/models/double/infer"
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg"}
pytestmark = pytest.mark.parametrize("kind", FILES)


class Balancer:
    """A balancer before two servers, the engines of which may be made to fail."""

    def __init__(self, rest: int, rpc: int) -> None:
        self.url, self.rpc = f"http://127.0.0.1:{rest}", f"127.0.0.1:{rpc}"
        self.engines = [FakeEngine(), FakeEngine()]
        self.servers: list[Server] = []


def configured(kind: str, folder: Path, ports: dict[str, int]) -> list[str]:
    """The command that runs the shipped configuration, which differs in its ports alone."""
    text = (DEPLOY / FILES[kind]).read_text(encoding="utf-8")
    for port, own in ports.items():
        text, count = re.subn(rf"(127\.0\.0\.1:|port ){port}\b", rf"\g<1>{own}", text)
        assert count
    file = folder / FILES[kind]
    file.write_text(text, encoding="utf-8")
    if kind == "haproxy":
        return ["haproxy", "-db", "-f", str(file)]
    return ["nginx", "-p", str(folder), "-c", str(file), "-g", "daemon off;"]


@contextlib.asynccontextmanager
async def balanced(kind: str, folder: Path) -> AsyncIterator[Balancer]:
    if shutil.which(kind) is None:
        pytest.skip(f"{kind} is not installed: apt-get install {kind}")
    ports = dict(zip(("80", "81"), free_ports(2), strict=True))
    found = Balancer(ports["80"], ports["81"])
    async with contextlib.AsyncExitStack() as stack:
        for engine, (rest, rpc) in zip(found.engines, (("8000", "8001"), ("8010", "8011")), strict=True):
            server = await stack.enter_async_context(served(engine, grpc_port=0))
            assert server.rest_port is not None
            assert server.grpc_port is not None
            ports |= {rest: server.rest_port, rpc: server.grpc_port}
            found.servers.append(server)
        command = configured(kind, folder, ports)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            async with httpx2.AsyncClient() as client, asyncio.timeout(10):
                while not await is_up(client, found.url):
                    assert process.poll() is None, process.communicate()
                    await asyncio.sleep(0.05)
            yield found
        finally:
            process.terminate()
            process.communicate(timeout=10)


async def is_up(client: httpx2.AsyncClient, url: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return (await client.get(f"{url}/v2/health/ready")).status_code == 200
    return False


async def statuses(client: httpx2.AsyncClient, url: str, count: int) -> list[int]:
    return [(await client.post(f"{url}{INFER}", json=infer_body())).status_code for _ in range(count)]


@looped
async def test_both_answer_and_one_that_ends_is_not_missed(kind: str, tmp_path: Path) -> None:
    async with balanced(kind, tmp_path) as found, httpx2.AsyncClient(timeout=10) as client:
        assert await statuses(client, found.url, 20) == [200] * 20
        assert all(engine.answered for engine in found.engines)
        asking = [asyncio.ensure_future(statuses(client, found.url, 40)) for _ in range(4)]
        await asyncio.sleep(0.05)
        await found.servers[0].stop()
        assert await asyncio.gather(*asking) == [[200] * 40] * 4


@looped
async def test_a_refusal_that_did_nothing_goes_to_the_other(kind: str, tmp_path: Path) -> None:
    async with balanced(kind, tmp_path) as found, httpx2.AsyncClient(timeout=10) as client:
        found.engines[0].error = UnavailableError("no worker")
        assert await statuses(client, found.url, 20) == [200] * 20
        if kind == "nginx":
            found.engines[0].error = OverloadedError("too much waits", retry_after_s=1.0)
            assert await statuses(client, found.url, 20) == [200] * 20
        # a failure of the model is no business of the balancer
        for engine in found.engines:
            engine.error, engine.started = WorkerError("it failed"), 0
        assert await statuses(client, found.url, 3) == [500] * 3
        assert sum(engine.started for engine in found.engines) == 3


@looped
async def test_what_speaks_of_one_server_is_not_passed_on(kind: str, tmp_path: Path) -> None:
    async with balanced(kind, tmp_path) as found, httpx2.AsyncClient(timeout=10) as client:
        for path in ("/v2/repository/models/double/load", "/metrics"):
            got = await client.post(f"{found.url}{path}")
            assert (got.status_code, got.headers["content-type"]) == (403, "application/json")
            assert "call each server by itself" in got.json()["error"]
        assert [engine.loads for engine in found.engines] == [[], []]
        # nothing that the server refuses is changed on the way
        got = await client.post(f"{found.url}{INFER}", content=b"{")
        assert (got.status_code, "JSON" in got.json()["error"]) == (400, True)
        foreign = await client.post(f"{found.url}{INFER}", json=infer_body(), headers={"Origin": "http://other"})
        assert foreign.status_code == 403
        own = await client.post(f"{found.url}{INFER}", json=infer_body(), headers={"Origin": found.url})
        assert own.status_code == 200


@looped
async def test_grpc(kind: str, tmp_path: Path) -> None:
    async with balanced(kind, tmp_path) as found, grpc.aio.insecure_channel(found.rpc) as channel:
        ask = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", response_deserializer=messages.ModelInferResponse.FromString
        )
        for count in range(20):
            if count == 10:
                await found.servers[0].stop()
            assert (await ask(request().SerializeToString(), timeout=10)).model_name == "double"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(request("none").SerializeToString(), timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
