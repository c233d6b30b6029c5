"""Traces of requests for OpenTelemetry: when each was read, waited, was computed and answered; nothing that was sent.

A request's spans are made when it is answered, of times that are kept anyway or that the engine notes for it alone.
Those of its rows are of the one that was answered last, which is the one that it waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, final

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from trilevel import __version__
from trilevel.serving.front import Call
from trilevel.serving.requests import Reply
from trilevel.serving.status import status_of

_SERVICE = "OTEL_SERVICE_NAME"


class _Open(NamedTuple):
    """A span, and what its moments of `time.monotonic` are behind the time of day, in nanoseconds."""

    span: trace.Span
    offset_ns: int

    def at(self, moment: float) -> int:
        return self.offset_ns + int(moment * 1e9)


@final
class OpenTelemetry:
    """See `trilevel.serving.front.Tracer`.

    Args:
        provider: of OpenTelemetry, which samples the spans and sends them on.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("trilevel.serving", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, call: Call, headers: Mapping[str, str]) -> _Open | None:
        """A span of the whole request, below that of the client's `traceparent`; None where it is not sampled."""
        parent = self._propagator.extract(headers)
        name, offset_ns = f"{call.protocol} {call.route}", time.time_ns() - time.monotonic_ns()
        started = offset_ns + int(call.started * 1e9)
        span = self._tracer.start_span(name, parent, trace.SpanKind.SERVER, start_time=started)
        return _Open(span, offset_ns) if span.is_recording() else None

    def end(self, call: Call, status: str, error: BaseException | None) -> None:
        """Make and end all spans of a request."""
        whole, now = call.span, time.monotonic()
        assert isinstance(whole, _Open)
        span = whole.span
        span.set_attributes({"trilevel.request_id": call.id, "trilevel.status": status, "trilevel.model": call.model})
        asked = call.asked or now
        self._add(whole, "receive", call.started, asked)
        if call.reply is not None:
            replied = call.replied or now
            self._add_steps(whole, call.reply, asked, replied)
            self._add(whole, "answer", replied, now)
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            if status_of(error).http >= 500:
                # its message may quote what was sent
                span.set_status(trace.StatusCode.ERROR)
        span.end(whole.at(now))

    def close(self) -> None:
        """Send what was not yet sent."""
        self._provider.shutdown()

    def _add_steps(self, whole: _Open, reply: Reply, asked: float, replied: float) -> None:
        """A row waits, and then segments run, as often as they do."""
        whole.span.set_attributes({"trilevel.version": reply.version, "trilevel.rows": len(reply.paths)})
        whole.span.set_attribute("trilevel.paths", sorted(set(reply.paths)))
        before = asked
        for step in reply.steps:
            if step.begun > before:
                self._add(whole, "queue", before, step.begun)
            before = step.begun + step.seconds
            self._add(whole, "segment", step.begun, before, {"trilevel.path": step.path, "trilevel.batch": step.rows})
        self._add(whole, "collect" if reply.steps else "engine", before, replied)

    def _add(
        self, whole: _Open, name: str, begun: float, ended: float, attributes: Mapping[str, Any] | None = None
    ) -> None:
        context = trace.set_span_in_context(whole.span)
        child = self._tracer.start_span(name, context, attributes=attributes, start_time=whole.at(begun))
        child.end(whole.at(max(begun, ended)))


def to_collector(url: str) -> OpenTelemetry:
    """Traces to a collector that takes OTLP over HTTP; sampling and the rest are said by the variables `OTEL_...`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get(_SERVICE, "trilevel")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return OpenTelemetry(provider)
