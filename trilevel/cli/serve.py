"""`trilevel serve`: artifacts over REST and gRPC; `trilevel serve-key`: who may call."""

from __future__ import annotations

import contextlib
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trilevel.cli.export import RuntimeName

if TYPE_CHECKING:
    from trilevel.serving.catalog import Source
    from trilevel.serving.engine import EngineConfig
    from trilevel.serving.keys import Keys
    from trilevel.serving.server import ServerConfig
    from trilevel.serving.tracing import OpenTelemetry

_SHIPPED = "documents"


class RoleName(enum.StrEnum):
    """Of whoever has a key."""

    user = "user"
    admin = "admin"


class EngineName(enum.StrEnum):
    """Where rows run."""

    local = "local"
    ray = "ray"


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]ARTIFACT...", help="Folders of artifacts; `documents` is the one that ships."),
    ],
    host: Annotated[str, typer.Option(help="Address; any but loopback is reached by other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Of REST; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=-1, max=65_535, help="Of gRPC; 0 a free one, -1 none.")] = 8001,
    instances: Annotated[int | None, typer.Option(min=1, help="Workers of a model; default: what cores leave.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each worker; default: what cores leave.")] = None,
    slo_ms: Annotated[float | None, typer.Option(min=0.1, help="Within which every answer should come.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=128, help="Rows that run together.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Rows that wait; more are told to come later.")] = 1024,
    max_wait_ms: Annotated[float, typer.Option(min=0.0, help="That a free worker waits for more rows.")] = 0.0,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Of requests that name none.")] = 60.0,
    runtime: Annotated[
        RuntimeName | None, typer.Option(help="Default: that of the certificate, else openvino on x86.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys (trilevel serve-key).")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate in PEM, with --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, without a password.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="That signs clients' certificates (mTLS).")] = None,
    audit: Annotated[Path | None, typer.Option(help="Folder of the audits, so that an alarm is remembered.")] = None,
    shadow_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of rows that the audit compares.")] = 0.02,
    engine: Annotated[
        EngineName, typer.Option(help="`ray`: the nodes of the cluster at RAY_ADDRESS, or one of this machine alone.")
    ] = EngineName.local,
    max_replicas: Annotated[int, typer.Option(min=1, help="Of a model, with --engine ray.")] = 4,
    trace_to: Annotated[
        str | None, typer.Option(help="Collector of traces, such as http://localhost:4318/v1/traces (OTLP).")
    ] = None,
    quiet: Annotated[bool, typer.Option(help="Log failures alone, not every request.")] = False,
) -> None:
    """Serve artifacts: Open Inference Protocol over REST and gRPC, texts and files at /v1/predict, /v1/summarize.

    Rows are batched by the path that they take. SIGTERM and Ctrl-C answer what was accepted, then end; a second one
    ends at once. / is a console for browsers, /metrics for Prometheus, /openapi.json describes the interface.
    """
    from trilevel.errors import ConfigError
    from trilevel.serving.batching import BatchingConfig
    from trilevel.serving.engine import EngineConfig
    from trilevel.serving.keys import Keys
    from trilevel.serving.logs import log_to
    from trilevel.serving.pool import PoolConfig, shares
    from trilevel.serving.server import ServerConfig, run
    from trilevel.serving.tls import Tls

    if (tls_cert is None) != (tls_key is None) or (tls_client_ca is not None and tls_cert is None):
        raise ConfigError("--tls-cert and --tls-key go together, and --tls-client-ca with both.")
    tls = None if tls_cert is None or tls_key is None else Tls(
        certificate=tls_cert, key=tls_key, client_ca=tls_client_ca
    )  # fmt: skip
    if engine == EngineName.ray and (tls or audit or trace_to):
        raise ConfigError("--tls-..., --audit and --trace-to are not for --engine ray; docs/serving.md says what is.")
    found = _sources(artifacts)
    # on a cluster a replica takes no more than it is told to, and Ray finds the cores
    count, each = (instances or 1, threads or 1) if engine == EngineName.ray else shares(instances, threads)
    config = EngineConfig(
        runtime=None if runtime is None else runtime.value,
        pool=PoolConfig(instances=count, threads=each),
        batching=BatchingConfig(
            max_batch=max_batch,
            max_queue=max_queue,
            max_wait_s=max_wait_ms / 1e3,
            slo_s=None if slo_ms is None else slo_ms / 1e3,
        ),
        shadow_share=shadow_share,
        audit_folder=audit,
    )
    server = ServerConfig(host=host, rest_port=port, grpc_port=None if grpc_port < 0 else grpc_port, tls=tls)
    import logging

    log_to(level=logging.WARNING if quiet else logging.INFO)
    if engine == EngineName.ray:
        _serve_on_ray(found, config, server, keys, timeout_s, max_replicas)
        return
    with contextlib.closing(_tracer(trace_to)) if trace_to else contextlib.nullcontext() as tracer:
        run(_serve(found, config, server, Keys() if keys is None else Keys.load(keys), timeout_s, tracer))


async def _serve(
    sources: tuple[Source, ...],
    config: EngineConfig,
    server_config: ServerConfig,
    keys: Keys,
    timeout_s: float,
    tracer: OpenTelemetry | None,
) -> None:
    from trilevel.applications.serving import task_routes
    from trilevel.serving.console.pages import console
    from trilevel.serving.engine import LocalEngine
    from trilevel.serving.front import Front
    from trilevel.serving.metrics import Metrics
    from trilevel.serving.server import Server

    metrics = Metrics()
    async with LocalEngine(sources, config, metrics) as engine:
        front = Front(engine, keys=keys, metrics=metrics, timeout_s=timeout_s, tracer=tracer)
        routes = task_routes(engine, {source.name: source.folder for source in sources})
        server = Server(front, server_config, tasks=routes, pages=console())
        scheme = "http" if server_config.tls is None else "https"
        names = ", ".join(f"{info.name} ({info.task}, {info.version[:12]})" for info in engine.models())
        typer.echo(f"serving {names}", err=True)
        typer.echo(f"{scheme}://{server_config.host}:{server_config.rest_port}", err=True)
        await server.serve()


def _tracer(url: str) -> OpenTelemetry:
    from trilevel.errors import require

    require("opentelemetry.exporter.otlp.proto.http.trace_exporter", extra="tracing")
    from trilevel.serving.tracing import to_collector

    found: OpenTelemetry = to_collector(url)
    return found


def _serve_on_ray(
    sources: tuple[Source, ...],
    config: EngineConfig,
    server: ServerConfig,
    keys: Path | None,
    timeout_s: float,
    max_replicas: int,
) -> None:
    from trilevel.errors import require

    require("ray.serve", extra="ray")
    from trilevel.serving import ray

    own = ray.RayConfig(engine=config, max_replicas=max_replicas, keys=keys, timeout_s=timeout_s)
    ray.run(sources, own, host=server.host, rest_port=server.rest_port, grpc_port=server.grpc_port)


def serve_key(
    name: Annotated[str, typer.Argument(help="Of whoever gets the key: letters, digits, dots, hyphens.")],
    file: Annotated[Path, typer.Argument(help="That `trilevel serve --keys` reads; the key's hash is added to it.")],
    role: Annotated[RoleName, typer.Option(help="An `admin` may load and unload models too.")] = RoleName.user,
) -> None:
    """Make an API key: it is printed once, and its hash is kept."""
    from trilevel.compression.written import write_bytes
    from trilevel.serving.keys import new_key

    key, line = new_key(name, role.value)
    before = file.read_bytes() if file.exists() else b""
    write_bytes(file, before + (b"" if before.endswith(b"\n") or not before else b"\n") + f"{line}\n".encode())
    typer.echo(key)


def _sources(artifacts: list[str]) -> tuple[Source, ...]:
    from trilevel.applications.documents.artifact import INT8
    from trilevel.serving.catalog import sources

    named = [f"{_SHIPPED}={INT8}" if text == _SHIPPED and not Path(text).exists() else text for text in artifacts]
    found: tuple[Source, ...] = sources(named)
    return found
