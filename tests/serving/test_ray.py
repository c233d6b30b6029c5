"""A cluster of Ray with three nodes on this machine: the same protocol, more replicas under load, a node that dies."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import httpx2
import numpy as np
import pytest

from tests.artifact.installed import cached
from tests.artifact.installed import run as run_command
from tests.serving.fake_engine import looped
from tests.serving.fake_model import INPUT_ERROR, SLEEPS, expected, pixels, write_fake
from trilevel.bench.serving.process import free_ports
from trilevel.client import AsyncClient, Retry
from trilevel.serving.grpc_methods import SERVICE
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.server import run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]


def ray(target: Path) -> None:
    """Ray Serve and what it needs, beside the environment of the tests: it is no part of the extra `all`."""
    fixed = ("--quiet", "--quiet", "--only-binary=:all:", "--constraint", str(ROOT / "constraints.txt"))
    run_command(sys.executable, "-m", "pip", "install", *fixed, "--target", str(target), "ray[serve]>=2.60")


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of processes that find Ray, and write nothing to the home of whoever runs the tests."""
    found = cached("ray", ray)
    # short: the names of sockets go below it, and may have 107 characters
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as home:
        own = {"HOME": home, "RAY_TMPDIR": home, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
        yield {**os.environ, **own, "PYTHONPATH": f"{found}{os.pathsep}{ROOT}"}


class Cluster:
    """The process of `ray_cluster.py`."""

    def __init__(self, process: subprocess.Popen[str], rest_port: int, grpc_port: int) -> None:
        self.url, self.rpc = f"http://127.0.0.1:{rest_port}", f"127.0.0.1:{grpc_port}"
        self._process = process

    def tell(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.heard()

    def heard(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    write_fake(folder / "fake")
    ports = free_ports(2)
    command = [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), str(folder / "fake"), *map(str, ports)]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            found = Cluster(process, *ports)
            assert found.heard() == "ready", (folder / "log").read_text()[-3000:]
            yield found
            process.communicate(timeout=100)
            assert process.returncode == 0, (folder / "log").read_text()[-3000:]
        finally:
            process.kill()


def sent(row: np.ndarray) -> dict[str, Any]:
    return {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": row.ravel().tolist()}]}


@looped
async def test_rest_and_its_errors(cluster: Cluster) -> None:
    async with httpx2.AsyncClient(base_url=cluster.url, timeout=20) as client:
        for name in ("fake", "twin"):
            got = await client.post(f"/v2/models/{name}/infer", json=sent(pixels(3)), headers={"X-Request-Id": "7"})
            assert (got.status_code, got.json()["model_name"], got.headers["x-request-id"]) == (200, name, "7")
            assert got.json()["outputs"][0]["data"] == expected(3).tolist()
        asked: list[tuple[str, dict[str, Any], int, str]] = [
            ("/v2/models/none/infer", sent(pixels(3)), 404, "no model 'none'; served are fake, twin."),
            ("/v2/models/fake/infer", sent(pixels(3, wish=INPUT_ERROR)), 400, "the pixels are wrong."),
            ("/v2/models/fake/infer", sent(pixels(3)) | {"parameters": {"timeout": 1}}, 504, "the deadline had passed"),
            ("/v2/repository/models/fake/load", {}, 409, "deploy again"),
            ("/v1/nothing", {}, 404, "nothing is served at /v1/nothing"),
        ]
        for path, body, status, message in asked:
            got = await client.post(path, json=body)
            assert (got.status_code, message in got.json()["error"]) == (status, True), got.text
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        assert "trilevel" in (await client.get("/")).text


@looped
async def test_grpc_and_its_errors(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.rpc) as channel:

        def ask(method: str, data: bytes) -> Any:
            kind = getattr(messages, f"{method}Response")
            return channel.unary_unary(f"/{SERVICE}/{method}", response_deserializer=kind.FromString)(data, timeout=20)

        assert (await ask("ServerReady", b"")).ready
        request = messages.ModelInferRequest(model_name="twin", raw_input_contents=[pixels(5).tobytes()])
        request.inputs.add(name="pixels", datatype="UINT8", shape=[1, 1, 2, 3])
        got = await ask("ModelInfer", request.SerializeToString())
        assert np.frombuffer(got.raw_output_contents[0], np.float32).tolist() == expected(5).tolist()
        request.model_name = "none"
        for data, code in ((request.SerializeToString(), "NOT_FOUND"), (b"\xff\xff", "INVALID_ARGUMENT")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask("ModelInfer", data)
            assert caught.value.code().name == code


async def ask_many(client: AsyncClient, count: int, at_once: int) -> list[str]:
    """What was wrong with the answers to so many requests, each for a row of its own."""
    limit, wrong = asyncio.Semaphore(at_once), []

    async def ask(number: int) -> None:
        async with limit:
            try:
                got = await client.infer("fake", {"pixels": pixels(number % 200, wish=SLEEPS * (number % 4 == 0))})
            # whatever it is, the request is lost
            except Exception as error:
                wrong.append(f"{number}: {error!r}")
                return
            if got.outputs["logits"].tolist() != [expected(number % 200).tolist()]:
                wrong.append(f"{number}: {got.outputs}")

    await asyncio.gather(*map(ask, range(count)))
    return wrong


async def until_replicas(cluster: Cluster, count: int) -> None:
    async with asyncio.timeout(90):
        while await asyncio.to_thread(cluster.tell, "replicas") != str(count):
            await asyncio.sleep(1)


def test_a_third_replica_under_load(cluster: Cluster) -> None:
    async def work() -> None:
        assert await asyncio.to_thread(cluster.tell, "replicas") == "2"
        async with AsyncClient(cluster.url, timeout_s=60) as client:
            asking = asyncio.ensure_future(ask_many(client, 5_000, 48))
            await until_replicas(cluster, 3)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    run(work())


def test_a_node_dies_under_load_and_no_request_is_lost(cluster: Cluster) -> None:
    async def work() -> None:
        # the client asks once: what is tried again, the cluster tries again
        async with AsyncClient(cluster.url, timeout_s=60, retry=Retry(attempts=1)) as client:
            asking = asyncio.ensure_future(ask_many(client, 600, 16))
            await asyncio.sleep(3)
            assert not asking.done(), await asking
            await asyncio.to_thread(cluster.tell, "kill")
            assert await asking == []
        # the replicas that died with the node are started on another one
        await until_replicas(cluster, 3)

    run(asyncio.wait_for(work(), 150))


def test_one_command_serves_the_shipped_summariser(environment: dict[str, str]) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "trilevel", "serve", "documents", "--engine", "ray", "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            said = b""
            for line in process.stderr:
                if b'"event":"started"' in line:
                    break
                said += line
            assert process.poll() is None, said.decode()[-3000:]
            text = "Cats sleep. The cat of the house sleeps all day long. Dogs do not."
            got = httpx2.post(f"http://127.0.0.1:{port}/v1/summarize", json={"text": text, "sentences": 1}, timeout=60)
            assert (got.status_code, len(got.json()["sentences"])) == (200, 1), got.text
            process.terminate()
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "0 artifacts were named"),
        ({"artifacts": "a=/a", "replicas": "2"}, "replicas is no argument; there are artifacts, instances,"),
        ({"artifacts": "a=/a", "threads": "many"}, "threads='many' is no int"),
        ({"artifacts": "a=/a", "min_replicas": "5"}, "min_replicas=5, max_replicas=4"),
    ],
)
def test_arguments_that_are_none(environment: dict[str, str], given: dict[str, str], message: str) -> None:
    code = f"from trilevel.serving.ray import app; app({given!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert f"trilevel.errors.ConfigError: {message}" in done.stderr
