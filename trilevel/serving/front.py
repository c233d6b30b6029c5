"""What REST and gRPC share: from a request as it was sent to the engine's reply, with its deadline, counts and log."""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from traceback import extract_tb
from typing import Protocol, final

from trilevel.serving.deadlines import Deadlines
from trilevel.serving.keys import Keys
from trilevel.serving.limits import Limits
from trilevel.serving.logs import LOG, say
from trilevel.serving.metrics import Metrics
from trilevel.serving.protocol.check import check_inputs, wanted_outputs
from trilevel.serving.protocol.json_infer import Infer
from trilevel.serving.requests import DeadlineError, Engine, OverloadedError, Reply, Request
from trilevel.serving.status import status_of

_PROCESS, _NUMBERS = secrets.token_hex(8), itertools.count(1)
_SHED: dict[type[BaseException], str] = {OverloadedError: "overload", DeadlineError: "deadline"}


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of a client, of whatever protocol, from its first byte to its answer.

    Attributes:
        id: of the client, else made here.
        started: of `time.monotonic`.
        timeout_s: that the client or its protocol asked for.
        key: name of the API key.
        model: its name, once the engine knew it.
        reply: of the engine, where there was one.
        span: of the tracer, where it wants the call.
        asked, replied: when the engine was, and did, of a call with a span.
    """

    protocol: str
    route: str
    id: str = ""
    started: float = field(default_factory=time.monotonic)
    timeout_s: float | None = None
    key: str = ""
    model: str = ""
    reply: Reply | None = None
    span: object = None
    asked: float = 0.0
    replied: float = 0.0


class Tracer(Protocol):
    """Told of calls; `trilevel.serving.tracing.OpenTelemetry` is one."""

    def begin(self, call: Call, headers: Mapping[str, str]) -> object:
        """What the call keeps as its span, None for none; headers are those that trace contexts come in."""
        ...

    def end(self, call: Call, status: str, error: BaseException | None) -> None:
        """A call that has a span was answered, or will not be."""
        ...


TRACE_HEADERS = ("traceparent", "tracestate")


@final
class Front:
    """An engine, and all that a front end needs to stand before it.

    Args:
        engine: that answers.
        limits: of requests.
        keys: of those who may call; none for everyone.
        metrics: that the engine fills too.
        timeout_s: of requests that name none; None lets them wait forever.
        tracer: None for no traces.

    Attributes:
        is_draining: the server ends: it says that it is not ready, and still answers.
        in_flight: calls that are being read or answered.
        pending_bytes: of bodies that are being read or answered.
        deadlines: of all that waits.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: Limits | None = None,
        keys: Keys | None = None,
        metrics: Metrics | None = None,
        timeout_s: float | None = 60.0,
        tracer: Tracer | None = None,
    ) -> None:
        self.engine = engine
        self.limits = limits or Limits()
        self.keys = keys or Keys()
        self.metrics = metrics or Metrics()
        self.timeout_s = timeout_s
        self.tracer = tracer
        self.is_draining = False
        self.in_flight = 0
        self.pending_bytes = 0
        self.deadlines = Deadlines()
        self.metrics.in_flight.set_function(lambda: self.in_flight)

    @property
    def is_ready(self) -> bool:
        """Whether requests for any model will be answered."""
        return not self.is_draining and self.engine.is_ready

    async def infer(self, call: Call, model: str, version: str, infer: Infer) -> tuple[Reply, tuple[str, ...]]:
        """The reply to a request, and which outputs of it to send.

        Raises:
            InputError: inputs or outputs are not the model's.
            ServingError: of the engine.
        """
        info = self.engine.model(model, version)
        call.model = info.name
        check_inputs(infer.inputs, info)
        wanted = wanted_outputs(tuple(infer.outputs), info)
        asked = infer.parameters
        request = Request(
            id=infer.id or call.id,
            model=model,
            version=version,
            inputs=infer.inputs,
            deadline=self.deadline(call, asked.timeout_s),
            priority=asked.priority,
            max_loss=asked.max_loss,
            is_explained=asked.is_explained,
        )
        return await self.answer(call, request), wanted

    def deadline(self, call: Call, timeout_s: float | None = None) -> float | None:
        """The earliest of the deadlines that the call and the request set; of neither, the server's own."""
        asked = [seconds for seconds in (call.timeout_s, timeout_s) if seconds is not None]
        seconds = min(asked, default=self.timeout_s)
        return None if seconds is None else call.started + seconds

    async def answer(self, call: Call, request: Request) -> Reply:
        """The engine's reply, or DeadlineError as soon as it comes too late, whatever the engine does."""
        left = None if request.deadline is None else request.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineError("the deadline had passed before the request was read.")
        try:
            if call.span is not None:
                request, call.asked = replace(request, is_traced=True), time.monotonic()
            with self.deadlines.within(left) as limit:
                call.reply = await self.engine.infer(request)
            call.replied = time.monotonic() if call.span is not None else 0.0
        except TimeoutError as error:
            if not limit.is_over:
                raise
            raise DeadlineError("the deadline passed before the answer came; ask with more time.") from error
        return call.reply

    def finished(self, call: Call, status: str, error: BaseException | None = None) -> None:
        """Count and log a call; `status` is its protocol's."""
        self._traced(call, status, error)
        if error is not None:
            self.metrics.refused(call.protocol, status, call.model, _SHED.get(type(error), ""))
            self._log(call, logging.ERROR if status_of(error).http == 500 else logging.WARNING, status, error)
            return
        if call.reply is not None:
            self.metrics.answered(call.protocol, status, call.reply)
        self._log(call, logging.INFO, status, None)

    def gone(self, call: Call, status: str) -> None:
        """Count and log a call whose client went away before its answer."""
        self._traced(call, status, None)
        self.metrics.refused(call.protocol, status, call.model)
        self._log(call, logging.INFO, status, None)

    def _traced(self, call: Call, status: str, error: BaseException | None) -> None:
        if self.tracer is not None and call.span is not None:
            self.tracer.end(call, status, error)

    def _log(self, call: Call, level: int, status: str, error: BaseException | None) -> None:
        if not LOG.isEnabledFor(level):
            return
        fields: dict[str, object] = {
            "id": call.id,
            "protocol": call.protocol,
            "route": call.route,
            "model": call.model,
            "status": status,
            "ms": round((time.monotonic() - call.started) * 1000, 3),
        }
        if call.key:
            fields["key"] = call.key
        if call.reply is not None:
            fields |= {"version": call.reply.version, "rows": len(call.reply.paths)}
        if error is not None:
            fields["error"] = type(error).__name__
        if level == logging.ERROR and error is not None:
            # where, but not what it said: messages of others may quote what was sent
            fields["trace"] = [f"{one.filename}:{one.lineno} {one.name}" for one in extract_tb(error.__traceback__)]
        say(level, "request", **fields)


def new_id() -> str:
    """An id for a request that has none: of this process, and then counted."""
    return f"{_PROCESS}-{next(_NUMBERS):x}"
