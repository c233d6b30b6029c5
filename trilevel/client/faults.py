"""What calls of a server end with, other than a result."""

from __future__ import annotations

from trilevel.errors import TrilevelError


class CallError(TrilevelError):
    """A call that brought no result.

    Attributes:
        status: of HTTP; None where no answer came.
        request_id: that the server's log has.
    """

    def __init__(self, message: str, *, status: int | None = None, request_id: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.request_id = request_id


class RefusedError(CallError):
    """The server does not take this request (4xx); it would refuse it again."""


class BusyError(CallError):
    """The server has too much to do, or nobody to do it (429, 503), and was asked as often as allowed.

    Attributes:
        retry_after_s: when it said to ask again; None where it did not.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, **known: object) -> None:
        super().__init__(message, **known)  # type: ignore[arg-type]
        self.retry_after_s = retry_after_s


class LateError(CallError):
    """No result came within the time that was given."""


class FailedError(CallError):
    """The server failed (5xx), could not be reached, or answered what cannot be read."""
