"""The seam for routes that speak of texts and pictures, not tensors: applications fill it, the server knows none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from trilevel.serving.requests import Reply, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What was sent to a task route.

    Attributes:
        body: the whole of it.
        content_type: without parameters, in lower case, such as `application/json` or `text/plain`.
        parameters: of the address, the last of each name, such as `model`.
        id: for the `Request`.
        deadline: for the `Request`, as there.
    """

    body: bytes
    content_type: str
    parameters: Mapping[str, str]
    id: str
    deadline: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request for the engine, and how its reply is told as JSON."""

    request: Request
    answer: Callable[[Reply], Mapping[str, Any]]


class TaskRoute(Protocol):
    """`POST /v1/NAME`: makes tensors of what people send, and words of what comes out."""

    @property
    def summary(self) -> str:
        """One line for the page of the interface."""
        ...

    @property
    def content_types(self) -> tuple[str, ...]:
        """Which are read; others are refused."""
        ...

    @property
    def fields(self) -> Mapping[str, Mapping[str, Any]]:
        """Schemas of what a body as JSON holds, by name; beside other bodies all but the content is in the address."""
        ...

    @property
    def content(self) -> tuple[str, ...]:
        """The fields that hold what is read; the first must be there."""
        ...

    def prepare(self, upload: Upload) -> Prepared:
        """Read what was sent; runs in a thread of its own, and so does `Prepared.answer`.

        Raises:
            InputError: it cannot be read.
            UnknownModelError: it names a model that is not served.
        """
        ...
