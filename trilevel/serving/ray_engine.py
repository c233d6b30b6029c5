"""The engine of a Ray cluster: each model has replicas of its own on any node, and requests go to them by name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Never, final

from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException

from trilevel.errors import ArtifactError, TrilevelError
from trilevel.serving.catalog import Source
from trilevel.serving.engine import EngineConfig, LocalEngine
from trilevel.serving.requests import (
    ModelInfo,
    OverloadedError,
    Reply,
    Request,
    UnavailableError,
    UnknownModelError,
    WorkerError,
)

_TRIES = 2
_LOOK_S = 1.0
_PATIENCE_S = 10.0


@final
class Replica:
    """One model on one node: the engine of `trilevel serve`, with its batches by path and its workers."""

    # Ray awaits it, and takes the replica for started when it ends
    async def __init__(self, source: Source, config: EngineConfig) -> None:  # type: ignore[misc]
        self._engine = LocalEngine([source], config)
        await self._engine.start()

    async def infer(self, request: Request, left_s: float | None) -> Reply | TrilevelError:
        """The reply, or what is wrong as a value, so that Ray neither wraps nor logs it.

        Args:
            request: as it was sent; its deadline is of another machine's clock.
            left_s: until then.
        """
        deadline = None if left_s is None else time.monotonic() + left_s
        try:
            return await self._engine.infer(replace(request, deadline=deadline))
        except TrilevelError as error:
            return error

    async def info(self) -> ModelInfo:
        """What it serves."""
        return self._engine.models()[0]

    async def check_health(self) -> None:
        """Raise when no worker will come back: Ray then starts another replica."""
        (info,) = self._engine.models()
        if info.state == "UNAVAILABLE":
            raise UnavailableError(info.reason)

    async def __del__(self) -> None:
        await self._engine.stop()


@final
class RayEngine:
    """See the module, and `Engine` for the methods.

    Args:
        handles: of Ray Serve, by the names of the models.
    """

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = dict(handles)
        self._infos = {name: _unknown(name) for name in handles}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Wait for a replica of each model, and look after them from then on."""
        self._infos = dict(zip(self._handles, await asyncio.gather(*map(self._ask, self._handles)), strict=True))
        self._tasks = [asyncio.ensure_future(self._look(name)) for name in self._handles]

    async def stop(self) -> None:
        """Look no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def infer(self, request: Request) -> Reply:
        """As of `Engine`. A replica that ends with its node fails the request, which then goes to another one, once."""
        self.model(request.model)
        for left in reversed(range(_TRIES)):
            try:
                found = await self._send(request)
            except (RayError, RayServeException) as error:
                if left and not isinstance(error, RayTaskError | BackPressureError | TaskCancelledError):
                    continue
                _refuse(error, request.model)
            if isinstance(found, Reply):
                return found
            if isinstance(found, UnknownModelError):
                raise UnavailableError(f"model {request.model!r} is being exchanged for another version; ask again.")
            raise found
        raise AssertionError("the last try returns or raises")

    def models(self) -> tuple[ModelInfo, ...]:
        """As of `Engine`."""
        return tuple(self._infos.values())

    def model(self, name: str, version: str = "") -> ModelInfo:
        """As of `Engine`."""
        if name not in self._infos:
            raise UnknownModelError(f"no model {name[:80]!r}; served are {', '.join(self._infos)}.")
        info = self._infos[name]
        if version not in ("", info.version):
            raise UnknownModelError(
                f"model {name!r} has no version {version[:80]!r}; version {info.version or 'none'} is served."
            )
        return info

    async def load(self, name: str) -> None:
        """Raise: Ray exchanges replicas one after the other, and knows how many there are."""
        self.model(name)
        raise ArtifactError(
            f"model {name!r} is not loaded by requests: deploy again (serve deploy), and Ray exchanges its replicas."
        )

    async def unload(self, name: str) -> None:
        """As `load`."""
        await self.load(name)

    @property
    def is_ready(self) -> bool:
        """As of `Engine`, by what each model said last."""
        return all(info.state == "READY" for info in self._infos.values())

    async def _send(self, request: Request) -> Reply | TrilevelError:
        left_s = None if request.deadline is None else max(0.0, request.deadline - time.monotonic())
        response = self._handles[request.model].infer.remote(replace(request, deadline=None), left_s)
        try:
            found: Reply | TrilevelError = await response
        except asyncio.CancelledError:
            # the client went away: its rows that wait are not computed
            response.cancel()
            raise
        return found

    async def _ask(self, name: str) -> ModelInfo:
        info: ModelInfo = await self._handles[name].info.remote()
        return info

    async def _look(self, name: str) -> None:
        """Learn of new versions, and of models that no replica answers for."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    self._infos[name] = await self._ask(name)
            except (TimeoutError, RayError, RayServeException):
                lost = replace(self._infos[name], state="LOADING", reason="no replica of it answers")
                self._infos[name] = lost


def _unknown(name: str) -> ModelInfo:
    return ModelInfo(
        name=name,
        version="",
        task="",
        state="LOADING",
        inputs=(),
        outputs=(),
        paths=(),
        settings={},
        reason="no replica of it is ready",
    )


def _refuse(error: Exception, model: str) -> Never:
    """Say in the engine's words why Ray brought no reply."""
    if isinstance(error, BackPressureError):
        raise OverloadedError(f"too much waits for model {model!r}; ask later.", retry_after_s=1.0) from error
    if isinstance(error, RayTaskError):
        raise WorkerError("the request failed in its replica; the log of Ray says why.") from error
    raise UnavailableError(f"no replica of model {model!r} answers; ask again.") from error
