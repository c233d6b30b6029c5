"""Our own server: the command as people run it, and the same parts with other batches, `python -m ...own SPEC`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trilevel.bench.serving.process import ServerProcess, free_ports
from trilevel.serving.batching import BatchingConfig
from trilevel.serving.catalog import Source
from trilevel.serving.engine import EngineConfig, LocalEngine
from trilevel.serving.front import Front
from trilevel.serving.logs import log_to
from trilevel.serving.metrics import Metrics
from trilevel.serving.opener import OPENER
from trilevel.serving.pool import PoolConfig
from trilevel.serving.server import Server, ServerConfig, run

READY = "/v2/health/ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """A server with one model; see `EngineConfig`, `PoolConfig` and `BatchingConfig`.

    Attributes:
        folder: of its artifact.
        name: that it is served under.
        port: of REST.
    """

    folder: str
    name: str
    port: int
    slo_s: float | None = None
    max_batch: int = 32
    max_wait_s: float = 0.0
    opener: str = OPENER
    instances: int = 1
    threads: int = 1


def start_command(
    artifact: Path, name: str, *, instances: int = 1, threads: int = 1, options: Sequence[str] = ()
) -> tuple[ServerProcess, int]:
    """`trilevel serve` with an artifact under a name, ready; and its port of gRPC."""
    port, grpc_port = free_ports(2)
    numbers = {"port": port, "grpc-port": grpc_port, "instances": instances, "threads": threads}
    given = [f"--{key}={value}" for key, value in numbers.items()]
    command = [sys.executable, "-m", "trilevel", "serve", f"{name}={artifact}", "--quiet", *given, *options]
    return ServerProcess(command, READY, port), grpc_port


def start_engine(spec: EngineSpec) -> ServerProcess:
    """A server of a specification, ready."""
    return ServerProcess([sys.executable, "-m", __name__, json.dumps(asdict(spec))], READY, spec.port)


async def serve(spec: EngineSpec) -> None:
    """What the command does, without tasks and pages; no audit, which takes time from the paths it watches."""
    batching = BatchingConfig(max_batch=spec.max_batch, max_wait_s=spec.max_wait_s, slo_s=spec.slo_s)
    pool = PoolConfig(instances=spec.instances, threads=spec.threads)
    config = EngineConfig(pool=pool, batching=batching, opener=spec.opener, shadow_share=0.0)
    metrics = Metrics()
    async with LocalEngine([Source(name=spec.name, folder=Path(spec.folder))], config, metrics) as engine:
        await Server(Front(engine, metrics=metrics), ServerConfig(rest_port=spec.port, grpc_port=None)).serve()


if __name__ == "__main__":
    log_to(level=logging.WARNING)
    run(serve(EngineSpec(**json.loads(sys.argv[1]))))
