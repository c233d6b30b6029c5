"""What a request may cost before anyone has looked at it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trilevel.errors import ConfigError

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes and times that a client cannot exceed; all positive.

    Attributes:
        body_bytes: of a request, over REST and gRPC alike.
        json_bytes: of the part of it that is JSON, which takes up to twenty times its size once read.
        pending_bytes: of all bodies that are being read or answered over REST; what comes on top is told to come later.
        json_depth: of lists and objects within each other.
        tensors: inputs of a request, and outputs it may ask for.
        axes: of a tensor.
        strings: in a tensor of BYTES.
        rows: of a request, the first axis of its inputs.
        header_bytes: of a request's first line and headers.
        header_s: for the first line and headers.
        body_s: for the body.
        idle_s: a connection may do nothing between requests.
        write_s: a client may take nothing of a reply.
        connections: open at a time over REST; where the system allows fewer open files, fewer.
        calls: at a time over gRPC.
    """

    body_bytes: int = 64 * MEBIBYTE
    json_bytes: int = 16 * MEBIBYTE
    pending_bytes: int = 512 * MEBIBYTE
    json_depth: int = 32
    tensors: int = 64
    axes: int = 8
    strings: int = 1 << 17
    rows: int = 4096
    header_bytes: int = 1 << 16
    header_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0
    write_s: float = 30.0
    connections: int = 1 << 14
    calls: int = 4096

    def __post_init__(self) -> None:
        """Check every value."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"Limits: {field.name}={value} must be a number above 0.")
