"""How far reading a data set is, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class ReadingProgress:
    """A bar for each thing that is done, called with what, how many are done, how many there are; gone at the end."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ReadingProgress:
        """Draw the bars."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take them away."""
        self.stop()

    def stop(self) -> None:
        """Take the bars away before something else is drawn; a second time does nothing."""
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the bar of `what`; every hundredth call is enough."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(f"{what} images", total=total)
        if done % 100 == 0 or done == total:
            self._progress.update(self._tasks[what], completed=done)
