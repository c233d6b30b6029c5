"""The engine: models by name, each with one version that answers; loaded, exchanged under load, drained.

>>> import asyncio
>>> async def answer(folder, inputs):
...     async with LocalEngine([Source.parse(folder)], EngineConfig()) as engine:
...         return await engine.infer(Request(id="1", model=engine.models()[0].name, inputs=inputs))
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, final

from trilevel.artifact.check import default_runtime, installed
from trilevel.artifact.manifest import Artifact
from trilevel.artifact.routed import has_paths, read_certificate, read_router
from trilevel.artifact.runtime.predictor import Runtime
from trilevel.errors import ConfigError, TrilevelError
from trilevel.routing.certificate import SEAL
from trilevel.serving.batching import BatchingConfig
from trilevel.serving.catalog import Snapshot, Source, take_snapshot
from trilevel.serving.observer import Nobody, Observer
from trilevel.serving.opener import OPENER
from trilevel.serving.plan import Plan
from trilevel.serving.pool import Pool, PoolConfig
from trilevel.serving.requests import ModelInfo, Reply, Request, State, UnavailableError, UnknownModelError
from trilevel.serving.served import Served
from trilevel.serving.shadow import Shadow

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How models are served.

    Attributes:
        runtime: of all models; None takes that of a model's certificate where it is installed, else the default one.
        pool: workers of each model.
        batching: how rows wait.
        shadow_share: of the rows of a certified model that the audit compares with the full path; 0 for no audit.
        audit_folder: where audits are kept, so that an alarm outlives the server; None for nowhere.
        opener: `module:function` that a worker opens a model with.
        retire_s: at most, for the requests of a version that was exchanged.

    Raises:
        ConfigError: a value is out of range.
    """

    runtime: Runtime | None = None
    pool: PoolConfig = field(default_factory=PoolConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    shadow_share: float = 0.02
    audit_folder: Path | None = None
    opener: str = OPENER
    retire_s: float = 300.0

    def __post_init__(self) -> None:
        """Check every value."""
        if not 0 <= self.shadow_share <= 1:
            raise ConfigError(f"shadow_share={self.shadow_share} must lie in 0 to 1; 0 switches the audit off.")


@dataclass(slots=True, kw_only=True)
class _Model:
    """A name: the version that answers, and what became of the latest try to load one."""

    source: Source
    current: Served | None = None
    snapshot: Snapshot | None = None
    state: State = "LOADING"
    reason: str = "it was not loaded yet"
    is_wanted: bool = True
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@final
class LocalEngine:
    """See `trilevel.serving.requests.Engine`; this one runs workers on this machine.

    Args:
        sources: of all models that it may serve.
        config: see there.
        observer: told of batches, queues and workers.
    """

    def __init__(
        self, sources: Sequence[Source], config: EngineConfig | None = None, observer: Observer | None = None
    ) -> None:
        self.config = config or EngineConfig()
        self._observer = observer or Nobody()
        self._models = {source.name: _Model(source=source) for source in sources}
        self._retiring: set[asyncio.Task[None]] = set()
        self._is_draining = False

    async def __aenter__(self) -> LocalEngine:
        """Started; raises as `start` does."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Drained and stopped."""
        await self.stop()
        return False

    async def start(self) -> None:
        """Load all models; if one cannot be loaded, all are stopped.

        Raises:
            ArtifactError: a model is damaged or fails its check.
        """
        try:
            await asyncio.gather(*map(self.load, self._models))
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, answer those that were accepted within the time, end all workers.

        Returns:
            Whether all were answered.
        """
        self._is_draining = True
        current = [model.current for model in self._models.values() if model.current is not None]
        drained = await asyncio.gather(*(served.drain(timeout_s) for served in current))
        if timeout_s is not None:
            for task in self._retiring:
                task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        for model in self._models.values():
            async with model.lock:
                await self._end(model, "the server ends")
        return all(drained)

    async def infer(self, request: Request) -> Reply:
        """See `Engine`."""
        return await self._find(request.model, request.version).infer(request)

    def models(self) -> tuple[ModelInfo, ...]:
        """See `Engine`."""
        return tuple(self._info(model) for model in self._models.values())

    def model(self, name: str, version: str = "") -> ModelInfo:
        """See `Engine`."""
        info = self._info(self._known(name))
        if version not in ("", info.version):
            raise _unknown_version(name, version, info.version)
        return info

    async def load(self, name: str) -> None:
        """See `Engine`; the version that answers goes on until the new one is ready, and if that fails."""
        model = self._known(name)
        async with model.lock:
            if self._is_draining:
                raise UnavailableError("the server ends; it loads no more.")
            model.is_wanted = True
            try:
                served, snapshot = await self._open(model.source)
            except BaseException as error:
                if model.current is None:
                    model.state, model.reason = "UNAVAILABLE", f"it could not be loaded: {error}"
                raise
            old, old_snapshot = model.current, model.snapshot
            model.current, model.snapshot = served, snapshot
            model.state, model.reason = "READY", ""
            _LOG.info("model %s: version %s answers", name, served.version)
        if old is not None:
            task = asyncio.ensure_future(_retire(old, old_snapshot, self.config.retire_s))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def unload(self, name: str) -> None:
        """See `Engine`."""
        model = self._known(name)
        async with model.lock:
            model.is_wanted = False
            await self._end(model, "it was unloaded")

    @property
    def is_ready(self) -> bool:
        """See `Engine`; models that were unloaded on purpose do not count."""
        wanted = [model for model in self._models.values() if model.is_wanted]
        return not self._is_draining and all(one.current is not None and one.current.is_ready for one in wanted)

    async def _open(self, source: Source) -> tuple[Served, Snapshot]:
        snapshot = await asyncio.to_thread(take_snapshot, source)
        artifact, config = snapshot.artifact, self.config
        pool: Pool | None = None
        try:
            runtime = await asyncio.to_thread(runtime_of, artifact, config.runtime)
            options = {"folder": str(artifact.path), "version": snapshot.version, "runtime": runtime}
            pool = Pool(config.opener, options, config.pool)
            await pool.start()
            plan = await asyncio.to_thread(Plan, artifact, pool.facts)
            shadow = await asyncio.to_thread(self._shadow, source.name, plan)
            served = Served(source.name, snapshot.version, plan, pool, config.batching, self._observer, shadow)
        except BaseException:
            if pool is not None:
                await pool.stop()
            snapshot.remove()
            raise
        if plan.reason:
            _LOG.info("model %s: %s", source.name, plan.reason)
        return served, snapshot

    def _shadow(self, name: str, plan: Plan) -> Shadow | None:
        if plan.certificate is None or not self.config.shadow_share:
            return None
        folder = self.config.audit_folder
        state = None if folder is None else folder / f"{name}-{str(plan.certificate.to_dict()[SEAL])[:12]}.json"
        try:
            return Shadow(plan.certificate, state, self.config.shadow_share)
        except ConfigError as error:
            _LOG.info("model %s is not audited: %s", name, error)
            return None

    async def _end(self, model: _Model, reason: str) -> None:
        """Answer what waits, then stop; new requests are refused from the first moment."""
        served, snapshot = model.current, model.snapshot
        model.current = model.snapshot = None
        model.state, model.reason = "UNAVAILABLE", reason
        if served is not None:
            await _retire(served, snapshot, 0.0 if self._is_draining else self.config.retire_s)

    def _known(self, name: str) -> _Model:
        if name not in self._models:
            raise UnknownModelError(f"no model {name[:80]!r}; served are {', '.join(self._models)}.")
        return self._models[name]

    def _find(self, name: str, version: str) -> Served:
        model = self._known(name)
        if self._is_draining:
            raise UnavailableError("the server ends; ask another one.")
        if model.current is None:
            raise UnavailableError(f"model {name!r} does not answer: {model.reason}.")
        if version not in ("", model.current.version):
            raise _unknown_version(name, version, model.current.version)
        return model.current

    def _info(self, model: _Model) -> ModelInfo:
        if model.current is not None:
            return model.current.info
        return ModelInfo(
            name=model.source.name,
            version="",
            task="",
            state=model.state,
            inputs=(),
            outputs=(),
            paths=(),
            settings={},
            reason=model.reason,
        )


def _unknown_version(name: str, version: str, known: str) -> UnknownModelError:
    return UnknownModelError(f"model {name!r} has no version {version[:80]!r}; version {known or 'none'} is served.")


async def _retire(served: Served, snapshot: Snapshot | None, timeout_s: float) -> None:
    try:
        if not await served.drain(timeout_s) and timeout_s:
            _LOG.warning("version %s of %s ends with requests unanswered", served.version, served.name)
    finally:
        await served.close()
        if snapshot is not None:
            await asyncio.to_thread(snapshot.remove)


def runtime_of(artifact: Artifact, asked: Runtime | None) -> Runtime:
    """That which was asked for, else that which the certificate is of, else the default."""
    if asked is not None:
        return asked
    try:
        certificate = read_certificate(artifact, read_router(artifact)) if has_paths(artifact) else None
    except TrilevelError:
        # the worker says what is wrong with it
        certificate = None
    wanted = None if certificate is None else certificate.platform.runtime
    return next((name for name in installed() if name == wanted), default_runtime(artifact))
