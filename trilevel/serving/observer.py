"""Who is told what an engine does; metrics are one."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Told of batches, queues and workers; `trilevel.serving.metrics.Metrics` is one."""

    def batch(self, model: str, path: str, rows: int) -> None:
        """A batch ran; the path is the one that ends behind its segment."""
        ...

    def queue(self, model: str, queue: str, rows: int) -> None:
        """So many rows wait in a queue."""
        ...

    def workers(self, model: str, live: int) -> None:
        """So many workers of a model live."""
        ...

    def restarted(self, model: str) -> None:
        """A worker was started anew."""
        ...

    def audit(self, model: str, *, samples: int, mean: float, is_alarmed: bool) -> None:
        """The audit of a model's certificate saw more."""
        ...


class Nobody:
    """An observer that does nothing."""

    def batch(self, model: str, path: str, rows: int) -> None:
        """See `Observer`, as for all others."""

    def queue(self, model: str, queue: str, rows: int) -> None:
        """Nothing."""

    def workers(self, model: str, live: int) -> None:
        """Nothing."""

    def restarted(self, model: str) -> None:
        """Nothing."""

    def audit(self, model: str, *, samples: int, mean: float, is_alarmed: bool) -> None:
        """Nothing."""
