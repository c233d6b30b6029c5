"""When to ask again, and when to give up: a conversation that both clients lead, without a socket in it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from trilevel.client.faults import BusyError, CallError, FailedError, LateError, RefusedError
from trilevel.errors import ConfigError

_BUSY = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often and when to ask again, where asking again is safe.

    Before attempt n + 1 the client waits at random between 0 and `base_s` * 2^n, at most `cap_s` ("full jitter",
    Brooker 2015), so that clients that were refused together do not come back together; where the server says how long,
    on top of that.

    Attributes:
        attempts: in all, the first one included.
        base_s, cap_s: of the waits.
    """

    attempts: int = 4
    base_s: float = 0.1
    cap_s: float = 5.0

    def __post_init__(self) -> None:
        """Check every value."""
        if self.attempts < 1 or not 0 < self.base_s <= self.cap_s:
            raise ConfigError(f"{self}: attempts must be 1 or more, and 0 < base_s <= cap_s.")

    def wait_s(self, attempt: int, least_s: float | None, draw: Callable[[], float] = random.random) -> float:
        """Seconds before the next attempt; `attempt` counts those made, from 1."""
        most_s: float = min(self.cap_s, self.base_s * 2**attempt)
        return (least_s or 0.0) + draw() * most_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Send one request, within `timeout_s` (None for no limit)."""

    method: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    timeout_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    body: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Nothing came back."""

    reason: str
    is_late: bool


Steps = Generator[Ask | Sleep, Answer | Lost | None, Answer]
"""Yields what to do, is sent what came of it, and returns the answer."""


def conversation(
    method: str,
    path: str,
    *,
    retry: Retry,
    timeout_s: float | None,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    is_repeatable: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Steps:
    """Ask, and ask again while that is safe and time is left.

    Safe are answers that say that nothing was done (429, 503), and lost connections of requests that may be made twice.

    Args:
        timeout_s: for everything, the waits included.
        is_repeatable: whether a request that was lost on the way may be sent again.
    """
    ends = None if timeout_s is None else clock() + timeout_s
    for attempt in range(1, retry.attempts + 1):
        left = None if ends is None else ends - clock()
        if left is not None and left <= 0:
            raise LateError(f"no result within {timeout_s:g} s.")
        asked = dict(headers or {})
        if left is not None:
            asked["X-Request-Timeout-Ms"] = str(max(1, min(int(left * 1000), 86_400_000)))
        got = yield Ask(method=method, path=path, body=body, headers=asked, timeout_s=left)
        if isinstance(got, Answer) and got.status < 400:
            return got
        assert got is not None
        error = _error(got)
        wait = retry.wait_s(attempt, error.retry_after_s if isinstance(error, BusyError) else None)
        again = isinstance(error, BusyError) or (isinstance(got, Lost) and is_repeatable and not got.is_late)
        # a wait that ends after the deadline helps nobody
        if not again or attempt == retry.attempts or (ends is not None and clock() + wait >= ends):
            raise error
        yield Sleep(seconds=wait)
    raise AssertionError("the last attempt returns or raises")


def _error(got: Answer | Lost) -> CallError:
    if isinstance(got, Lost):
        kind = LateError if got.is_late else FailedError
        return kind(f"no answer came ({got.reason}); is the server at this address, and up?")
    known: dict[str, Any] = {"status": got.status, "request_id": got.headers.get("x-request-id", "")}
    message = f"{got.status}: {_message(got.body)}"
    if got.status in _BUSY:
        return BusyError(message, retry_after_s=_retry_after_s(got.headers), **known)
    if got.status == 504:
        return LateError(message, **known)
    return (FailedError if got.status >= 500 else RefusedError)(message, **known)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace") or "no reason was given"


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    # the second may be a date, which servers of models do not send
    for name, scale in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            return max(0.0, float(headers[name]) / scale)
        except (KeyError, ValueError):
            continue
    return None
