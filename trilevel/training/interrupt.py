"""Ctrl-C and SIGTERM during training: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped from outside after writing a checkpoint; the message says how to go on.

    A `KeyboardInterrupt`, so that whatever ends a program on Ctrl-C does so here (the command line with exit code 130).
    """


class StopRequest:
    """Within the context, the first SIGINT or SIGTERM sets `is_set`; the second interrupts at once.

    Outside the main thread nothing is changed: Python delivers signals to the main thread only.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> StopRequest:
        """Take the two signals over."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
