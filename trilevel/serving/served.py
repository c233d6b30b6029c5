"""One version of a model that answers: requests are taken apart into rows, and rows put together to replies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any, final

import numpy.typing as npt

from trilevel.errors import InputError
from trilevel.serving.batching import BatchingConfig
from trilevel.serving.dispatch import Dispatcher
from trilevel.serving.observer import Observer
from trilevel.serving.plan import Plan
from trilevel.serving.pool import Pool
from trilevel.serving.requests import (
    Arrays,
    ModelInfo,
    Reply,
    Request,
)
from trilevel.serving.rows import RequestTicket, Row, ShadowTicket, row_of
from trilevel.serving.shadow import Shadow

_LOG = logging.getLogger(__name__)
_TICK_S = 0.25
# inputs of more bytes are read in a thread, so that others do not wait for them
_LARGE_BYTES = 1 << 20


@final
class Served:
    """See the module.

    Args:
        name, version: of the model.
        plan: what its rows go through.
        pool: its workers, started; they are this object's from now on.
        batching: how rows wait.
        observer: told of what happens.
        shadow: the audit; None for none.
    """

    def __init__(
        self,
        name: str,
        version: str,
        plan: Plan,
        pool: Pool,
        batching: BatchingConfig,
        observer: Observer,
        shadow: Shadow | None = None,
    ) -> None:
        self.name, self.version, self.plan, self.pool = name, version, plan, pool
        self._dispatcher = Dispatcher(name, plan, pool, batching, observer)
        self._observer, self._shadow = observer, shadow
        self._num_inside = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._loop = asyncio.get_running_loop()
        self._tick = asyncio.ensure_future(self._ticks())
        pool.on_restart = partial(observer.restarted, name)
        if shadow is not None:
            self._heed_alarm(shadow)

    @property
    def is_ready(self) -> bool:
        """Whether a worker lives; each runs every path."""
        return self.pool.live > 0

    @property
    def info(self) -> ModelInfo:
        """What it says of itself."""
        inputs, outputs = self.plan.specs
        is_lost = bool(self.pool.given_up)
        return ModelInfo(
            name=self.name,
            version=self.version,
            task=self.plan.task,
            state="READY" if self.is_ready else ("UNAVAILABLE" if is_lost else "LOADING"),
            inputs=inputs,
            outputs=outputs,
            paths=self.plan.paths,
            settings=self.plan.settings,
            reason=self.plan.reason if self.is_ready else (self.pool.given_up or "its workers are being restarted"),
        )

    async def infer(self, request: Request) -> Reply:
        """See `Engine.infer`."""
        self._num_inside += 1
        self._is_empty.clear()
        try:
            return await self._infer(request)
        finally:
            self._num_inside -= 1
            if not self._num_inside:
                self._is_empty.set()

    async def drain(self, timeout_s: float | None) -> bool:
        """Wait until every request that was accepted has its answer; whether that came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_empty.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop the workers; whatever waits fails."""
        self._tick.cancel()
        self._dispatcher.close()
        await self.pool.stop()
        if self._shadow is not None:
            await self._shadow.save()

    async def _infer(self, request: Request) -> Reply:
        arrived, plan = time.monotonic(), self.plan
        plan.check(request.inputs)
        count = len(next(iter(request.inputs.values())))
        if count > self._dispatcher.config.max_queue:
            raise InputError(f"{count} rows were sent; send {self._dispatcher.config.max_queue} at most in a request.")
        # before anything is computed for it: whoever is refused costs next to nothing
        self._dispatcher.admit(count, plan.longest(request.inputs), arrived, request.deadline)
        rule_off = self._rule_off(request)
        is_large = sum(array.nbytes for array in request.inputs.values()) > _LARGE_BYTES
        read = partial(_read, plan, request.inputs, is_routed=not rule_off)
        features, routes, pieces = await asyncio.to_thread(read) if is_large else read()
        # an alarm may have come since
        if routes is not None and plan.rule is None:
            features = routes = None
        on_row = self._observed if self._shadow is not None and routes is not None else None
        future = self._loop.create_future()
        ticket = RequestTicket(request, arrived, count, future, on_row)
        for place, piece in enumerate(pieces):
            route = plan.full if routes is None else routes[place]
            row = row_of(ticket, place, piece, route, arrived, request)
            row.is_shadowed = on_row is not None and self._shadow is not None and self._shadow.wants(request.id, place)
            ticket.rows.append(row)
        timer = None
        if request.deadline is not None:
            timer = self._loop.call_later(max(0.0, request.deadline - arrived), self._dispatcher.late, ticket)
        try:
            self._dispatcher.add(ticket.rows, arrived)
            await future
        finally:
            self._dispatcher.leave(ticket.rows)
            if timer is not None:
                timer.cancel()
        explanations = self._explained(ticket, features, rule_off) if request.is_explained else ()
        return ticket.reply(self.name, self.version, time.monotonic(), explanations)

    def _rule_off(self, request: Request) -> str:
        """Why a request takes the full path whatever the rule says; empty if it does not."""
        plan = self.plan
        if plan.rule is None or request.max_loss is None or request.max_loss >= plan.bound:
            return ""
        return f"a loss of {request.max_loss:g} at most was asked for, and {plan.bound:g} is what is certified"

    def _explained(
        self, ticket: RequestTicket, features: npt.NDArray[Any] | None, rule_off: str
    ) -> tuple[dict[str, Any], ...]:
        return tuple(
            self.plan.explained(
                None if features is None else features[row.place : row.place + 1],
                row.begun,
                row.margins,
                ticket.paths[row.place],
                row.length,
                rule_off,
            )
            for row in ticket.rows
        )

    def _observed(self, row: Row, outputs: Arrays, path: str) -> None:
        """Compare the answer of a sampled row; one of the full path is right by definition."""
        shadow = self._shadow
        assert shadow is not None
        if path == self.plan.full_name:
            self._compared(shadow, differs=False)
            return
        shadow.num_waiting += 1

        def end() -> None:
            shadow.num_waiting -= 1

        ticket = ShadowTicket(outputs, lambda differs: self._compared(shadow, differs=differs), end)
        own = replace(row, ticket=ticket, deadline=None, priority=-1, is_counted=False, is_shadowed=False, tries=0)
        own.arrived, own.spent, own.margins = time.monotonic(), 0.0, []
        own.begins(self.plan.full)
        self._dispatcher.add([own], own.arrived)

    def _compared(self, shadow: Shadow, *, differs: bool) -> None:
        shadow.audit.observe(float(differs))
        self._heed_alarm(shadow)

    def _heed_alarm(self, shadow: Shadow) -> None:
        if shadow.alarm and self.plan.rule is not None:
            self.plan.stop(shadow.alarm)
            _LOG.warning("model %s: %s", self.name, shadow.alarm)

    async def _ticks(self) -> None:
        """Tell the observer what changes all the time, and keep the audit."""
        told: dict[str, int] = {}
        while True:
            await asyncio.sleep(_TICK_S)
            self._observer.workers(self.name, self.pool.live)
            now = self._dispatcher.waiting()
            for queue in told.keys() | now.keys():
                self._observer.queue(self.name, queue, now.get(queue, 0))
            told = now
            if self._shadow is not None:
                audit = self._shadow.audit
                self._observer.audit(self.name, samples=audit.samples, mean=audit.mean, is_alarmed=audit.is_alarmed)
                # a full disk must not end this
                with contextlib.suppress(OSError):
                    await self._shadow.save()


def _read(plan: Plan, inputs: Arrays, *, is_routed: bool) -> tuple[Any, Any, Any]:
    """Features and routes, None for the full path; and pieces."""
    features = plan.features(inputs) if is_routed else None
    return features, plan.start(features), plan.pieces(inputs)
