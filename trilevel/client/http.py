"""What both clients tell and hear from httpx2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trilevel.client.attempts import Answer, Lost
from trilevel.errors import ConfigError

_POOL = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of a connection pool."""

    url: str
    key: str | None
    verify: Any

    def __post_init__(self) -> None:
        """Check the address."""
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"url={self.url!r} must begin with http:// or https://, as in http://127.0.0.1:8000.")

    def of_httpx(self) -> dict[str, Any]:
        """As httpx2 takes them."""
        import httpx2

        limits = httpx2.Limits(max_connections=_POOL, max_keepalive_connections=_POOL, keepalive_expiry=30.0)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # a proxy of the environment must not see requests to this machine
        return {
            "base_url": self.url,
            "headers": headers,
            "limits": limits,
            "verify": self.verify,
            "trust_env": False,
            "follow_redirects": False,
        }


def answer_of(response: Any) -> Answer:
    """An answer, whole."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Answer(status=response.status_code, body=response.content, headers=headers)


def lost_of(error: Exception) -> Lost:
    """Why no answer came; what is no fault of the way is raised again."""
    import httpx2

    if not isinstance(error, httpx2.TransportError):
        raise error
    # a connection that was never made is no sign that time is over: another attempt may find the server up
    is_late = isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout)
    return Lost(reason=f"{type(error).__name__}: {error}".rstrip(": "), is_late=is_late)
