"""Logs of the server: a JSON object a line, with request ids and without anything that was sent or answered."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

import orjson

LOG = logging.getLogger("trilevel.serving")


class JsonLines(logging.Formatter):
    """Writes time, level and event, and then what the record carries in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return orjson.dumps(said, default=str).decode()


def log_to(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Write the server's log to `stream` (standard error), and no longer through the root logger.

    At INFO every request has a line, at WARNING those alone that failed.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    LOG.handlers[:] = [handler]
    LOG.setLevel(level)
    LOG.propagate = False


def say(level: int, event: str, **fields: object) -> None:
    """Log an event with its fields, where the level is on."""
    if LOG.isEnabledFor(level):
        LOG.log(level, event, extra={"fields": fields})
