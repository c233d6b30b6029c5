"""What front ends hand to the engine and what they get back; and what can go wrong on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy.typing as npt

from trilevel.errors import TrilevelError

Arrays = Mapping[str, npt.NDArray[Any]]
"""By name; the first axis of each is the rows of a request."""
State = Literal["READY", "LOADING", "UNAVAILABLE"]


class ServingError(TrilevelError):
    """A request that got no answer; front ends map each class to a status of their protocol."""


class UnknownModelError(ServingError):
    """No model of this name, or not of this version."""


class OverloadedError(ServingError):
    """Too much waits already.

    Attributes:
        retry_after_s: when to ask again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[OverloadedError], tuple[str, float]]:
        # between the processes of a cluster
        return type(self), (str(self), self.retry_after_s)


class DeadlineError(ServingError):
    """The answer would come, or came, too late."""


class UnavailableError(ServingError):
    """No worker can answer now: loading, draining, or restarted after a crash."""


class WorkerError(ServingError):
    """The request was tried, twice where that may help, and failed in the worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Rows for one model.

    Attributes:
        id: of the client, or made by the front end; the audit draws by it.
        model: its name.
        version: of it; empty for the newest that is ready.
        inputs: of the graph.
        deadline: of `time.monotonic`, in seconds; None for none.
        priority: larger ones first; equal ones by their deadlines.
        max_loss: the most that may be lost on average; below what the certificate promises, the full path runs.
        is_explained: whether the reply says why each row took its path.
        is_traced: whether it says when segments ran.
    """

    id: str
    model: str
    inputs: Arrays
    version: str = ""
    deadline: float | None = None
    priority: int = 0
    max_loss: float | None = None
    is_explained: bool = False
    is_traced: bool = False


class Step(NamedTuple):
    """A segment that a row passed: the path that ends behind it, when it began by `time.monotonic`, with whom."""

    path: str
    begun: float
    seconds: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to all rows of a request, in their order.

    Attributes:
        model, version: that answered, one version for all rows.
        outputs: of the graph.
        paths: the path of each row.
        seconds: that the request spent in each stage: `queue`, `compute`, `total`.
        explanations: of each row, where asked for.
        steps: of the row that was answered last, where asked for.
    """

    model: str
    version: str
    outputs: Arrays
    paths: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    explanations: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output: NumPy's name of its type, and sizes, -1 where any is taken; the first is the rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One version of a model.

    Attributes:
        task: of its artifact: `documents`, `images`, `classification`, `embedding`, ...
        state: whether it answers; `reason` says why not.
        paths: names of those that rows may take, the full one last.
        settings: of the artifact, such as `labels`.
    """

    name: str
    version: str
    task: str
    state: State
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    paths: tuple[str, ...]
    settings: Mapping[str, Any]
    reason: str = ""


class Engine(Protocol):
    """What answers requests, whatever runs below it; front ends know nothing else."""

    async def infer(self, request: Request) -> Reply:
        """Answer a request; cancelled, its rows that wait are not computed.

        Raises:
            InputError: inputs are missing, unknown, or of another type or shape.
            ServingError: see its classes.
        """
        ...

    def models(self) -> tuple[ModelInfo, ...]:
        """All versions of all models."""
        ...

    def model(self, name: str, version: str = "") -> ModelInfo:
        """One model; without a version the newest that is ready, else the newest.

        Raises:
            UnknownModelError: there is none.
        """
        ...

    async def load(self, name: str) -> None:
        """Load, or load anew, the model of this name from where it was said to lie when the server started.

        Raises:
            UnknownModelError: none of this name was named.
            ArtifactError: the new version cannot be read or fails its check; the old one goes on.
        """
        ...

    async def unload(self, name: str) -> None:
        """Answer what waits, then stop a model; raises UnknownModelError."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether every path of every model has a live worker."""
        ...
