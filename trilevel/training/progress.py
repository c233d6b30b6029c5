"""The progress bar of training: steps, loss, speed, time left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from trilevel.errors import require

_REFRESH_S = 0.25


class ProgressBar:
    """A rich bar on standard error, so that standard output stays for results; nothing at all unless `is_shown`."""

    def __init__(self, *, steps: int, start_step: int, is_shown: bool) -> None:
        self._steps, self._start = steps, start_step
        self._bar = _make_bar() if is_shown else None
        self._task: Any = None
        self._last = 0.0

    def __enter__(self) -> ProgressBar:
        """Draw the bar."""
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._steps, completed=self._start, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, text: str) -> None:
        """Show that `step` steps are done; cheap enough to be called at each of them."""
        now = time.monotonic()
        if self._bar is None or (now - self._last < _REFRESH_S and step < self._steps):
            return
        self._last = now
        self._bar.update(self._task, completed=step, text=text)


def _make_bar() -> Any:
    progress = require("rich.progress", extra="train")
    console = require("rich.console", extra="train")
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=False),
        console=console.Console(stderr=True),
        refresh_per_second=4,
    )
