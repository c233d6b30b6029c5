"""An application of Ray Serve: front ends on some nodes of a cluster, and replicas of each model on any.

    serve run trilevel.serving.ray:app artifacts=mail=/models/mail.artifact,clothes=/models/clothes.artifact

Front ends are REST and gRPC as of `trilevel serve`, with the same protocol, tasks, limits and errors; each model is
scaled by itself, by the requests that it answers at once. gRPC and the addresses are options of Ray Serve, which
`deploy/ray.yaml` shows.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import ray
from ray import serve

from trilevel.errors import ConfigError
from trilevel.serving.batching import BatchingConfig
from trilevel.serving.catalog import Source, sources
from trilevel.serving.console.pages import console
from trilevel.serving.engine import EngineConfig
from trilevel.serving.front import Front
from trilevel.serving.grpc_methods import SERVICE, Methods, Refusal
from trilevel.serving.keys import Keys
from trilevel.serving.logs import log_to, say
from trilevel.serving.pool import PoolConfig
from trilevel.serving.protocol import open_inference_pb2 as messages
from trilevel.serving.ray_engine import RayEngine, Replica
from trilevel.serving.rest import RestApp
from trilevel.serving.rest_exchange import ID_HEADER, Message, Receive, Send
from trilevel.serving.server import LOOPBACK
from trilevel.serving.tasks import TaskRoute
from trilevel.serving.worker import named

NAME = "trilevel"
# the server's own log has a line for each request
_QUIET = {"enable_access_log": False}
_TASKS = "trilevel.applications.serving:task_routes"
_ARGUMENTS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "instances": ("pool", int),
    "threads": ("pool", int),
    "max_batch": ("batching", int),
    "max_queue": ("batching", int),
    "max_wait_s": ("batching", float),
    "slo_s": ("batching", float),
    "runtime": ("engine", str),
    "shadow_share": ("engine", float),
    "opener": ("engine", str),
    "min_replicas": ("cluster", int),
    "max_replicas": ("cluster", int),
    "num_ingresses": ("cluster", int),
    "keys": ("cluster", Path),
    "timeout_s": ("cluster", float),
    "tasks": ("cluster", str),
}
"""Of `serve run`: which configuration each belongs to, and its type."""
Tasks = Callable[[RayEngine, Mapping[str, Path]], Mapping[str, TaskRoute]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """What runs on a cluster, and how often.

    Attributes:
        engine: of every replica, which takes as many cores as its workers have threads.
        min_replicas, max_replicas: of each model; Ray moves between them.
        num_ingresses: front ends, on a node each; as many as there are nodes that clients call.
        keys: file of API keys, on every node.
        timeout_s: of requests that name none.
        tasks: `module:function` that makes the routes of tasks, which lie in a package that this one does not know.

    Raises:
        ConfigError: a value is out of range.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    min_replicas: int = 1
    max_replicas: int = 4
    num_ingresses: int = 1
    keys: Path | None = None
    timeout_s: float = 60.0
    tasks: str = _TASKS

    def __post_init__(self) -> None:
        """Check every value."""
        if not 1 <= self.min_replicas <= self.max_replicas or self.num_ingresses < 1:
            raise ConfigError(
                f"min_replicas={self.min_replicas}, max_replicas={self.max_replicas}, "
                f"num_ingresses={self.num_ingresses}: all must be >= 1, and the first at most the second."
            )


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The application of `serve run` and of Ray's configuration files.

    Args:
        arguments: `artifacts`, `NAME=FOLDER` with commas between, the same on every node; and values by name of
            `PoolConfig`, `BatchingConfig`, `EngineConfig` and `RayConfig`.

    Raises:
        ConfigError: an argument is none, or has no such value.
    """
    given = dict(arguments)
    found = sources(filter(None, str(given.pop("artifacts", "")).split(",")))
    parts: dict[str, dict[str, Any]] = {"pool": {}, "batching": {}, "engine": {}, "cluster": {}}
    for name, value in given.items():
        if name not in _ARGUMENTS:
            raise ConfigError(f"{name} is no argument; there are artifacts, {', '.join(_ARGUMENTS)}.")
        part, kind = _ARGUMENTS[name]
        try:
            parts[part][name] = kind(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{name}={value!r} is no {kind.__name__}.") from error
    engine = EngineConfig(
        pool=PoolConfig(**parts["pool"]), batching=BatchingConfig(**parts["batching"]), **parts["engine"]
    )
    return application(found, RayConfig(engine=engine, **parts["cluster"]))


def application(found: Sequence[Source], config: RayConfig) -> serve.Application:
    """The application for these models."""
    pool, batching = config.engine.pool, config.engine.batching
    model = serve.deployment(
        Replica,
        # the engine says itself when too much waits
        max_ongoing_requests=batching.max_queue,
        ray_actor_options={"num_cpus": pool.instances * pool.threads},
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "initial_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            # a batch that runs, and one that waits, at every worker
            "target_ongoing_requests": 2 * batching.max_batch * pool.instances,
            "upscale_delay_s": 5,
        },
        health_check_period_s=2,
        logging_config=_QUIET,
        graceful_shutdown_timeout_s=config.timeout_s,
    )
    replicas = {one.name: model.options(name=f"model-{one.name}").bind(one, config.engine) for one in found}
    ingress: serve.Application = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=config.num_ingresses, graceful_shutdown_timeout_s=config.timeout_s
    ).bind(config, {one.name: one.folder for one in found}, replicas)
    return ingress


def _method(name: str) -> Callable[..., Any]:
    async def call(self: Any, data: bytes, grpc_context: Any) -> Any:
        said = await self.methods.answer(name, data, grpc_context.invocation_metadata())
        if not isinstance(said, Refusal):
            return said
        grpc_context.set_code(getattr(grpc.StatusCode, said.status))
        grpc_context.set_details(said.message)
        grpc_context.set_trailing_metadata(list(said.trailer))
        # with such a status no message is sent, and where an error were raised no trailer
        return messages.ServerLiveResponse()

    return call


@serve.deployment(
    name="ingress",
    max_ongoing_requests=10_000,
    # beside the proxy of a node, which asks the one beside it first, and like it without cores of its own: both end
    # together, so that no proxy waits for a front end that is gone
    max_replicas_per_node=1,
    ray_actor_options={"num_cpus": 0},
    logging_config=_QUIET,
)
@serve.ingress()
class Ingress:
    """REST and gRPC before the replicas of all models."""

    async def __init__(  # type: ignore[misc]
        self, config: RayConfig, folders: Mapping[str, Path], handles: Mapping[str, Any]
    ) -> None:
        log_to()
        self.engine = RayEngine(handles)
        await self.engine.start()
        keys = Keys() if config.keys is None else Keys.load(config.keys)
        self.front = Front(self.engine, keys=keys, timeout_s=config.timeout_s)
        self.methods = Methods(self.front)
        tasks: Tasks = named(config.tasks)
        self._tasks = tasks(self.engine, folders)

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        return _without_id(RestApp(self.front, self._tasks, console()))

    async def __del__(self) -> None:
        await self.engine.stop()

    ServerLive = _method("ServerLive")
    ServerReady = _method("ServerReady")
    ModelReady = _method("ModelReady")
    ServerMetadata = _method("ServerMetadata")
    ModelMetadata = _method("ModelMetadata")
    ModelInfer = _method("ModelInfer")
    RepositoryIndex = _method("RepositoryIndex")
    RepositoryModelLoad = _method("RepositoryModelLoad")
    RepositoryModelUnload = _method("RepositoryModelUnload")


def _without_id(app: RestApp) -> Callable[..., Any]:
    """The same application; the id of a request stands in its answer by Ray's proxy already."""

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        async def pass_on(message: Message) -> None:
            if "headers" in message:
                message["headers"] = [one for one in message["headers"] if one[0] != ID_HEADER]
            await send(message)

        await app(scope, receive, pass_on)

    return answer


def add_to_server(servicer: Any, server: Any) -> None:
    """Name the methods to a server of gRPC, as Ray's `grpc_servicer_functions` do; messages go through as bytes."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in Methods.names}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def run(found: Sequence[Source], config: RayConfig, *, host: str, rest_port: int | None, grpc_port: int | None) -> None:
    """Serve on the cluster at `RAY_ADDRESS`, else on one of this machine alone, until SIGTERM or SIGINT.

    Ray's gRPC listens at all addresses, without TLS: it is on only where `host` is no loopback. Where Serve runs on the
    cluster already, its addresses stay as they are.
    """
    # nothing is told to others unless asked for
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if host in LOOPBACK:
        grpc_port = None
    options: dict[str, Any] = {"http_options": {"host": host, "port": rest_port}}
    if grpc_port is not None:
        options["grpc_options"] = {"port": grpc_port, "grpc_servicer_functions": [f"{__name__}:add_to_server"]}
    # "local": a cluster that happens to run on this machine is not joined unasked
    ray.init(os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False, configure_logging=False)
    serve.start(proxy_location="EveryNode", **options)
    serve.run(application(found, config), name=NAME, route_prefix="/")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    say(logging.INFO, "started", host=host, rest_port=rest_port, grpc_port=grpc_port)
    ended.wait()
    say(logging.INFO, "draining")
    serve.delete(NAME)
    ray.shutdown()
    say(logging.INFO, "ended")
