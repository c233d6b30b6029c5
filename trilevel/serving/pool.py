"""The worker processes of one version of a model: started, watched, restarted; each runs one job at a time.

This side imports no runtime. A worker that ends fails its job at once; what then becomes of the rows is the engine's
business. A worker whose beats stop is killed, which is the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from trilevel.errors import ArtifactError, ConfigError
from trilevel.serving.process import Done, Gone, Job, Process

_LOG = logging.getLogger(__name__)
_TICK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How many workers, and how long one may take.

    Attributes:
        instances: processes.
        threads: of each.
        start_timeout_s: to open the model and check it.
        liveness_timeout_s: without a beat; a worker beats four times in it, while it computes too.
        job_timeout_s: of a job that goes on forever while the worker beats.
        backoff_s: before the first restart; doubled at each one that follows without success.
        max_backoff_s: at most.
        max_failures: to start, one after another, before a worker is given up. One that ends later never is: whoever
            can make a worker end must not be able to end the server.

    Raises:
        ConfigError: a value is out of range.
    """

    instances: int = 1
    threads: int = 1
    start_timeout_s: float = 120.0
    liveness_timeout_s: float = 10.0
    job_timeout_s: float = 300.0
    backoff_s: float = 0.1
    max_backoff_s: float = 10.0
    max_failures: int = 5

    def __post_init__(self) -> None:
        """Check every value."""
        if min(self.instances, self.threads, self.max_failures) < 1:
            raise ConfigError(
                f"instances={self.instances}, threads={self.threads} and max_failures={self.max_failures} must be >= 1."
            )
        times = (self.start_timeout_s, self.liveness_timeout_s, self.job_timeout_s, self.backoff_s, self.max_backoff_s)
        if min(times) <= 0:
            raise ConfigError(f"the times of a pool must be above 0 seconds; they are {times}.")


def shares(instances: int | None, threads: int | None, cores: int | None = None) -> tuple[int, int]:
    """Instances and threads of each, where None is what the cores leave: all of them are used, and none twice.

    >>> shares(None, None, 8), shares(2, None, 8), shares(None, 4, 8), shares(3, 5, 8)
    ((8, 1), (2, 4), (2, 4), (3, 5))
    """
    if cores is None:
        # on Linux a container may be given some of the machine's
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    instances = max(1, cores // (threads or 1)) if instances is None else instances
    return instances, max(1, cores // instances) if threads is None else threads


@final
class Pool:
    """See the module. All of it runs in one event loop.

    Args:
        opener: `module:function` that opens the model in a worker.
        options: for it; JSON types.
        config: see there.

    Attributes:
        on_change: called when a worker became idle, or came, or went; never from within `submit`.
        on_restart: called when a worker is started anew.
        facts: what the workers said of the model.
        restarts: of workers, so far.
    """

    def __init__(
        self,
        opener: str,
        options: Mapping[str, Any],
        config: PoolConfig,
    ) -> None:
        self.config = config
        self.facts: Mapping[str, Any] = {}
        self.restarts = 0
        self._opener, self._options = opener, options
        self.on_change: Callable[[], None] = lambda: None
        self.on_restart: Callable[[], None] = lambda: None
        self._workers: list[Process] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._given_up: list[str] = []
        self._is_stopping = False

    @property
    def live(self) -> int:
        """Workers that answer."""
        return sum(worker.is_ready for worker in self._workers)

    @property
    def idle(self) -> int:
        """Workers that have nothing to do."""
        return sum(worker.is_idle for worker in self._workers)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the workers that answer."""
        return tuple(worker.pid for worker in self._workers if worker.is_ready)

    @property
    def given_up(self) -> str:
        """Why no worker will come back; empty as long as one may."""
        return self._given_up[-1] if len(self._given_up) == self.config.instances else ""

    async def start(self) -> None:
        """Start all workers and wait until each is ready; if one fails, all are stopped.

        Raises:
            ArtifactError: a worker could not open the model, ended, or was not ready in time.
        """
        self._workers = [self._process() for _ in range(self.config.instances)]
        starts = [asyncio.ensure_future(worker.start()) for worker in self._workers]
        try:
            found = await asyncio.gather(*starts)
        except BaseException:
            for one in starts:
                one.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.stop()
            raise
        self.facts = found[0]
        self._tasks = [asyncio.ensure_future(self._keep(place)) for place in range(len(self._workers))]
        self._tasks.append(asyncio.ensure_future(self._watch()))

    def submit(self, job: Job, done: Callable[[Done | Gone], None]) -> None:
        """Run a job on an idle worker, of which there must be one; `done` is called once, later."""
        worker = next(worker for worker in self._workers if worker.is_idle)
        worker.submit(job, done)

    async def stop(self, timeout_s: float = 5.0) -> None:
        """End all workers; whatever they run fails. Those that do not end in time are killed."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop(timeout_s) for worker in self._workers))

    def _process(self) -> Process:
        return Process(
            self._opener,
            {**self._options, "threads": self.config.threads},
            threads=self.config.threads,
            start_timeout_s=self.config.start_timeout_s,
            beat_s=self.config.liveness_timeout_s / 4,
            on_idle=self._changed,
        )

    def _changed(self) -> None:
        if not self._is_stopping:
            self.on_change()

    async def _keep(self, place: int) -> None:
        """Restart the worker of a place whenever it ends."""
        ended, failed, config = 0, 0, self.config
        while True:
            worker = self._workers[place]
            await worker.ended.wait()
            self._changed()
            await worker.stop(0)
            ended = 1 if worker.num_done else ended + 1
            failed = 0 if worker.was_ready else failed + 1
            if failed >= config.max_failures:
                self._given_up.append(f"a worker ended {failed} times before it was ready: {worker.failure}")
                _LOG.error("a place for a worker is given up: %s", self._given_up[-1])
                self._changed()
                return
            await asyncio.sleep(min(config.max_backoff_s, config.backoff_s * 2 ** min(ended - 1, 30)))
            _LOG.warning("a worker is started anew: %s", worker.failure)
            self.restarts += 1
            self.on_restart()
            self._workers[place] = self._process()
            # a failure ends the worker too, and the loop sees it there
            with contextlib.suppress(ArtifactError, OSError):
                await self._workers[place].start()
                self._changed()

    async def _watch(self) -> None:
        """Kill workers that hang."""
        config, before = self.config, time.monotonic()
        tick = min(_TICK_S, config.liveness_timeout_s / 4)
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            # this process stood still itself: beats may lie unread
            was_late = now - before > config.liveness_timeout_s / 2
            before = now
            for worker in self._workers:
                if was_late:
                    worker.heard = now
                elif worker.is_ready and now - worker.heard > config.liveness_timeout_s:
                    worker.kill(f"it gave no sign of life for {config.liveness_timeout_s:g} s")
                elif worker.busy_since is not None and now - worker.busy_since > config.job_timeout_s:
                    worker.kill(f"a job took more than {config.job_timeout_s:g} s")
