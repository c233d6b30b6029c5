"""The server as a whole: certificates, signals, and an end that loses nothing; and clients of others."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import httpx2
import numpy as np
import pytest

from tests.artifact.installed import environment
from tests.serving.fake_engine import FakeEngine, infer_body, looped, served, until
from tests.serving.test_grpc import request, rpc
from trilevel.client import AsyncClient
from trilevel.errors import ConfigError
from trilevel.serving.connection import open_files
from trilevel.serving.front import Front
from trilevel.serving.grpc_methods import SERVICE
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.server import Server, ServerConfig
from trilevel.serving.tls import Tls

ROOT = Path(__file__).parents[2]
INFER = "/v2/models/double/infer"
X = np.ones((1, 3), np.float32)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ca`, and `server` and `client` that it signed."""
    folder = tmp_path_factory.mktemp("certificates")
    try:
        openssl = partial(subprocess.run, cwd=folder, check=True, capture_output=True)
        new = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        openssl([*new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca"])
        for name in ("server", "client"):
            by = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
            by += ["-addext", "basicConstraints=CA:FALSE"]
            openssl([*new, *by, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"openssl makes no certificates: {error}")
    return folder


def tls(folder: Path, **given: Any) -> Tls:
    return Tls(**{"certificate": folder / "server.pem", "key": folder / "server.key", **given})


async def live_over_grpc(server: Server, folder: Path, *pair: bytes) -> bool:
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *pair)
    async with grpc.aio.secure_channel(f"localhost:{server.grpc_port}", credentials) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ServerLive", response_deserializer=messages.ServerLiveResponse.FromString
        )
        live: bool = (await call(b"", timeout=3)).live
        return live


@looped
async def test_tls(certificates: Path) -> None:
    trust = ssl.create_default_context(cafile=certificates / "ca.pem")
    async with served(FakeEngine(), grpc_port=0, tls=tls(certificates)) as server:
        url = f"https://127.0.0.1:{server.rest_port}"
        async with AsyncClient(url, verify=trust) as client:
            assert (await client.infer("double", {"x": X})).outputs["y"].tolist() == [[2, 2, 2]]
        async with httpx2.AsyncClient() as stranger:
            with pytest.raises(httpx2.ConnectError):
                await stranger.get(f"{url}/v2")
            with pytest.raises(httpx2.TransportError):
                await stranger.get(f"http://127.0.0.1:{server.rest_port}/v2")
        assert await live_over_grpc(server, certificates)


@looped
async def test_certificates_of_clients(certificates: Path) -> None:
    trust = ssl.create_default_context(cafile=certificates / "ca.pem")
    options = tls(certificates, client_ca=certificates / "ca.pem")
    async with served(FakeEngine(), grpc_port=0, tls=options) as server:
        url = f"https://127.0.0.1:{server.rest_port}/v2/health/live"
        async with httpx2.AsyncClient(verify=trust) as client:
            with pytest.raises(httpx2.TransportError):
                await client.get(url)
        trust.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        async with httpx2.AsyncClient(verify=trust) as client:
            assert (await client.get(url)).json() == {"live": True}
        with pytest.raises(grpc.aio.AioRpcError):
            await live_over_grpc(server, certificates)
        pair = [(certificates / f"client.{kind}").read_bytes() for kind in ("key", "pem")]
        assert await live_over_grpc(server, certificates, *pair)


def test_certificates_that_do_not_fit(certificates: Path, tmp_path: Path) -> None:
    for wrong in ({"key": certificates / "client.key"}, {"key": tmp_path / "none"}, {"client_ca": tmp_path / "none"}):
        with pytest.raises(ConfigError, match=r"TLS: .* cannot be used"):
            tls(certificates, **wrong).credentials()


def test_configurations_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="rest_port and grpc_port are both None"):
        ServerConfig(rest_port=None, grpc_port=None)
    with pytest.raises(ConfigError, match="port 70000 must lie in 0 to 65535"):
        ServerConfig(rest_port=70_000)
    with pytest.raises(ConfigError, match="drain_s=-1 must not be negative"):
        ServerConfig(drain_s=-1)


def test_it_listens_on_loopback_alone_unless_told_otherwise() -> None:
    assert ServerConfig().host == "127.0.0.1"
    assert 0 < open_files(100) <= 100


@looped
async def test_a_port_that_is_taken() -> None:
    async with served(FakeEngine()) as server:
        another = Server(server.front, ServerConfig(rest_port=server.rest_port))
        with pytest.raises(ConfigError, match=r"REST cannot listen at 127.0.0.1:\d+ .*choose another address"):
            await another.start()


@looped
async def test_an_end_that_loses_nothing() -> None:
    """Clients ask without pause; whatever was taken is answered, and refusals say so before anything was done."""
    engine = FakeEngine(delay_s=0.15)
    server = Server(Front(engine), ServerConfig(rest_port=0, grpc_port=0, drain_delay_s=0.1, drain_s=5))
    serving = asyncio.ensure_future(server.serve())
    await until(lambda: server.grpc_port)
    answered, refused, lost = [0, 0], 0, []

    async def ask_rest() -> None:
        nonlocal refused
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.rest_port}") as client:
            while True:
                try:
                    got = await client.post(INFER, json=infer_body())
                except httpx2.ConnectError:
                    refused += 1
                    return
                except httpx2.TransportError as error:
                    lost.append(error)
                    return
                assert got.status_code == 200
                answered[0] += 1

    async def ask_grpc() -> None:
        nonlocal refused
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            while True:
                try:
                    await call(request().SerializeToString())
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        lost.append(error)
                    refused += 1
                    return
                answered[1] += 1

    asking = asyncio.gather(*[ask_rest() for _ in range(13)], *[ask_grpc() for _ in range(13)])
    await until(lambda: min(answered) > 20)
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: server.front.is_draining)
    assert not server.front.is_ready
    await serving
    await asking
    assert not lost
    assert refused == 26
    assert engine.started == engine.answered == sum(answered)
    assert engine.cancelled == 0


@looped
async def test_what_does_not_end_is_cut_off() -> None:
    engine = FakeEngine(delay_s=60)
    server = Server(Front(engine), ServerConfig(rest_port=0, grpc_port=None, drain_delay_s=0, drain_s=0.3))
    serving = asyncio.ensure_future(server.serve())
    await until(lambda: server.rest_port)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.rest_port}", timeout=20) as client:
        asked = asyncio.ensure_future(client.post(INFER, json=infer_body()))
        await until(lambda: engine.started == 1)
        started = time.monotonic()
        server.end()
        await serving
        assert 0.25 < time.monotonic() - started < 2
        got = await asked
        assert (got.status_code, "the server ends" in got.text) == (503, True)
    assert engine.cancelled == 1


@looped
async def test_a_second_signal_ends_at_once() -> None:
    engine = FakeEngine(delay_s=60)
    server = Server(Front(engine), ServerConfig(rest_port=0, grpc_port=0, drain_delay_s=30, drain_s=30))
    serving = asyncio.ensure_future(server.serve())
    await until(lambda: server.grpc_port)
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.rest_port}", timeout=20) as client:
        asked = asyncio.ensure_future(client.post(INFER, json=infer_body()))
        await until(lambda: engine.started == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: server.front.is_draining)
        os.kill(os.getpid(), signal.SIGTERM)
        started = time.monotonic()
        await serving
        assert time.monotonic() - started < 2
        await asyncio.gather(asked, return_exceptions=True)


@looped
async def test_rest_alone_needs_no_grpc() -> None:
    async with rpc(FakeEngine()) as (_, server):
        assert server.rest_port is None
    code = "import sys, trilevel.serving.server, trilevel.client; print({'grpc', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


CLIENTS = {
    "tritonclient": (["tritonclient[http,grpc]>=2.60"], "foreign_triton.py", ["+double", "-double"] * 2),
    "kserve": (["kserve>=0.21", "pyyaml"], "foreign_kserve.py", []),
}


@pytest.fixture(params=CLIENTS)
def client_of_others(request: pytest.FixtureRequest) -> tuple[Path, str, list[str]]:
    """An interpreter with a client, whose protobuf is older than ours; its program; what that loads and unloads."""
    packages, script, loads = CLIENTS[request.param]
    return environment(request.param, *packages), script, loads


@pytest.mark.foreign
@pytest.mark.timeout(500)
@looped
async def test_clients_of_others_work_unchanged(client_of_others: tuple[Path, str, list[str]]) -> None:
    (python, script, loads), engine = client_of_others, FakeEngine()
    async with served(engine, grpc_port=0) as server:
        path = str(Path(__file__).with_name(script))
        ports = [str(server.rest_port), str(server.grpc_port)]
        done = await asyncio.to_thread(
            subprocess.run, [str(python), path, *ports], capture_output=True, text=True, timeout=100
        )
    assert (done.returncode, done.stdout) == (0, "all as expected\n"), done.stderr
    assert engine.loads == loads
