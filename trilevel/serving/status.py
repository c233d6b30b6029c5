"""The one table of what went wrong and how REST and gRPC say it."""

from __future__ import annotations

from typing import NamedTuple

from trilevel.errors import ArtifactError, InputError
from trilevel.serving.requests import (
    DeadlineError,
    OverloadedError,
    ServingError,
    UnavailableError,
    UnknownModelError,
    WorkerError,
)


class UnknownRouteError(ServingError):
    """Nothing is served at this address."""


class MethodError(ServingError):
    """The address is served for another method.

    Attributes:
        allowed: which.
    """

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class KeyRefusedError(ServingError):
    """No API key was sent, or one that is not known."""


class RoleError(ServingError):
    """The API key is known, and may not do this."""


class OriginError(ServingError):
    """A page of another site called."""


class TooLargeError(InputError):
    """A body is larger than the server takes."""


class MediaError(InputError):
    """A body is of a type, or in an encoding, that the route does not read."""


class TooSlowError(ServingError):
    """A client took too long to send its request."""


class Status(NamedTuple):
    """Of HTTP by number, of gRPC by name."""

    http: int
    grpc: str


STATUS: dict[type[BaseException], Status] = {
    InputError: Status(400, "INVALID_ARGUMENT"),
    TooLargeError: Status(413, "RESOURCE_EXHAUSTED"),
    MediaError: Status(415, "INVALID_ARGUMENT"),
    KeyRefusedError: Status(401, "UNAUTHENTICATED"),
    OriginError: Status(403, "PERMISSION_DENIED"),
    RoleError: Status(403, "PERMISSION_DENIED"),
    UnknownRouteError: Status(404, "UNIMPLEMENTED"),
    UnknownModelError: Status(404, "NOT_FOUND"),
    MethodError: Status(405, "UNIMPLEMENTED"),
    TooSlowError: Status(408, "DEADLINE_EXCEEDED"),
    ArtifactError: Status(409, "FAILED_PRECONDITION"),
    OverloadedError: Status(429, "RESOURCE_EXHAUSTED"),
    WorkerError: Status(500, "INTERNAL"),
    UnavailableError: Status(503, "UNAVAILABLE"),
    DeadlineError: Status(504, "DEADLINE_EXCEEDED"),
}
_UNEXPECTED = Status(500, "INTERNAL")


def status_of(error: BaseException) -> Status:
    """The status of an error: of its class, else of the nearest one above; what was not foreseen is the server's fault.

    >>> status_of(TooLargeError("8 GB")).http, status_of(KeyError("x")).grpc
    (413, 'INTERNAL')
    """
    return next((STATUS[one] for one in type(error).__mro__ if one in STATUS), _UNEXPECTED)


def message_of(error: BaseException, request_id: str) -> str:
    """What a client is told; of errors that were not foreseen nothing but where to look."""
    if any(one in STATUS for one in type(error).__mro__):
        return str(error)
    return f"the server failed; its log says why beside request {request_id}."
