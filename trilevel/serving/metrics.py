"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from typing import final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trilevel.serving.requests import Reply

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


@final
class Metrics:
    """Counters of one server, in a registry of its own, so that two servers of a process do not mix.

    Front ends call `answered` and `refused`; an engine the rest. No label holds what a client wrote: a model's name is
    one only after the engine knew it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = self._histogram(
            "request_seconds", "Of a request, by stage.", ("model", "path", "stage"), _SECONDS
        )
        self._batches = self._histogram("batch_rows", "Computed together.", ("model", "path"), _ROWS)
        self._requests = self._counter("requests", "Answered or refused.", "protocol", "model", "status")
        self._rows = self._counter("rows", "Answered, by the path they took.", "model", "path")
        self._sheds = self._counter("sheds", "Refused or given up for want of time.", "model", "reason")
        self._restarts = self._counter("worker_restarts", "Of worker processes.", "model")
        self._queues = self._gauge("queue_rows", "That wait.", "model", "queue")
        self._workers = self._gauge("workers", "That live.", "model")
        self._audit = self._gauge("audit", "Of the certificate: samples, mean loss, alarm (1).", "model", "value")
        self.in_flight = Gauge("trilevel_requests_in_flight", "Being read or answered.", registry=self.registry)
        self._known: dict[tuple[str, ...], Counter | Gauge | Histogram] = {}

    def answered(self, protocol: str, status: str, reply: Reply) -> None:
        """Count a reply; each path that its rows took gets the times of the whole request."""
        self._count(self._requests, protocol, reply.model, status).inc()
        for path in set(reply.paths):
            self._count(self._rows, reply.model, path).inc(reply.paths.count(path))
            for stage, seconds in reply.seconds.items():
                self._time(self._seconds, reply.model, path, stage).observe(seconds)

    def refused(self, protocol: str, status: str, model: str, shed: str = "") -> None:
        """Count an answer without a reply; `model` empty where unknown, `shed` why where time was short."""
        self._count(self._requests, protocol, model, status).inc()
        if shed:
            self._count(self._sheds, model, shed).inc()

    def batch(self, model: str, path: str, rows: int) -> None:
        """Count a batch that ran."""
        self._time(self._batches, model, path).observe(rows)

    def queue(self, model: str, queue: str, rows: int) -> None:
        """Say how many rows wait in a queue."""
        self._number(self._queues, model, queue).set(rows)

    def workers(self, model: str, live: int) -> None:
        """Say how many workers of a model live."""
        self._number(self._workers, model).set(live)

    def restarted(self, model: str) -> None:
        """Count a worker that was started anew."""
        self._count(self._restarts, model).inc()

    def audit(self, model: str, *, samples: int, mean: float, is_alarmed: bool) -> None:
        """Say what the audit of a model's certificate has seen."""
        for value, number in (("samples", samples), ("mean", mean), ("alarm", float(is_alarmed))):
            self._number(self._audit, model, value).set(number)

    def page(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(f"trilevel_{name}", said, labels, registry=self.registry)

    def _gauge(self, name: str, said: str, *labels: str) -> Gauge:
        return Gauge(f"trilevel_{name}", said, labels, registry=self.registry)

    def _histogram(self, name: str, said: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"trilevel_{name}", said, labels, buckets=buckets, registry=self.registry)

    def _count(self, of: Counter, *labels: str) -> Counter:
        # the library looks a child up under a lock, which costs more than counting
        key = (of._name, *labels)
        if key not in self._known:
            self._known[key] = of.labels(*labels)
        return self._known[key]  # type: ignore[return-value]

    def _time(self, of: Histogram, *labels: str) -> Histogram:
        key = (of._name, *labels)
        if key not in self._known:
            self._known[key] = of.labels(*labels)
        return self._known[key]  # type: ignore[return-value]

    def _number(self, of: Gauge, *labels: str) -> Gauge:
        key = (of._name, *labels)
        if key not in self._known:
            self._known[key] = of.labels(*labels)
        return self._known[key]  # type: ignore[return-value]
