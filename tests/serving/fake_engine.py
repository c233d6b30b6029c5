"""An engine without models, for tests of what stands before it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from trilevel.errors import ArtifactError
from trilevel.serving.front import Front
from trilevel.serving.requests import ModelInfo, Reply, Request, TensorSpec, UnknownModelError
from trilevel.serving.server import Server, ServerConfig, run

WIDTH = 3


def model(name: str, version: str = "1", **changes: Any) -> ModelInfo:
    info = ModelInfo(
        name=name,
        version=version,
        task="embedding",
        state="READY",
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, WIDTH)),),
        outputs=(
            TensorSpec(name="y", dtype="float32", shape=(-1, WIDTH)),
            TensorSpec(name="sum", dtype="float64", shape=(-1,)),
        ),
        paths=("int8/2", "float32/6"),
        settings={},
    )
    return replace(info, **changes)


def texts() -> ModelInfo:
    tensors = (
        TensorSpec(name="text", dtype="object", shape=(-1,)),
        TensorSpec(name="ids", dtype="int64", shape=(-1, -1)),
        TensorSpec(name="is", dtype="bool", shape=(-1,)),
    )
    return model("texts", inputs=tensors, outputs=tensors)


class FakeEngine:
    """`double` gives back twice its input, `texts` its inputs; each after `delay_s`, or it raises `error`."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.error: Exception | None = None
        self.requests: list[Request] = []
        self.started = self.answered = self.cancelled = 0
        self.is_ready = True
        self.known = {("double", "1"): model("double"), ("double", "2"): model("double", "2"), ("texts", "1"): texts()}
        self.loads: list[str] = []

    async def infer(self, request: Request) -> Reply:
        self.requests.append(request)
        self.started += 1
        if self.error is not None:
            raise self.error
        info = self.model(request.model, request.version)
        try:
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        self.answered += 1
        outputs = dict(request.inputs)
        if info.name == "double":
            x = request.inputs["x"]
            outputs = {"y": x * 2, "sum": x.sum(axis=1, dtype=np.float64)}
        rows = len(next(iter(request.inputs.values())))
        paths = tuple(info.paths[row % 2] for row in range(rows))
        why = tuple({"row": row} for row in range(rows)) if request.is_explained else ()
        seconds = {"queue": 0.001, "compute": 0.002, "total": 0.003}
        return Reply(
            model=info.name, version=info.version, outputs=outputs, paths=paths, seconds=seconds, explanations=why
        )

    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(self.known.values())

    def model(self, name: str, version: str = "") -> ModelInfo:
        found = [info for info in self.known.values() if info.name == name and version in ("", info.version)]
        if not found:
            raise UnknownModelError(f"no model {name!r} of version {version or 'any'}; served are double, texts.")
        return found[-1]

    async def load(self, name: str) -> None:
        if name == "broken":
            raise ArtifactError("artifact broken: model.onnx is missing.")
        self.model(name)
        self.loads.append(f"+{name}")

    async def unload(self, name: str) -> None:
        self.model(name)
        self.loads.append(f"-{name}")


@asynccontextmanager
async def served(engine: FakeEngine, *, front: Front | None = None, **options: Any) -> AsyncIterator[Server]:
    """A server at ports of the system's choice, drained at the end."""
    tasks = options.pop("tasks", None)
    pages = options.pop("pages", None)
    config = ServerConfig(**{"rest_port": 0, "grpc_port": None, "drain_delay_s": 0.0, "drain_s": 2.0, **options})
    server = Server(front or Front(engine), config, tasks=tasks, pages=pages)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def looped(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in the server's event loop, and not for ever."""

    @functools.wraps(test)
    def runs(*args: Any, **given: Any) -> None:
        run(asyncio.wait_for(test(*args, **given), 30))

    return runs


def infer_body(rows: int = 2, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "shape": [rows, WIDTH], "datatype": "FP32", "data": [1.5] * (rows * WIDTH)} | changes
    return {"inputs": [tensor]}


async def until(happens: Callable[[], object], seconds: float = 3.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not happens():
            await asyncio.sleep(0.01)
