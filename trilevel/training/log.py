"""What training writes down: a CSV file, and TensorBoard events when it is installed."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CSV_FILE = "log.csv"


class TrainingLog:
    """One line of numbers at a time, in `log.csv`; a resumed run drops the lines behind its checkpoint.

    A number that appears for the first time adds a column: the file is written anew then, which happens seldom.
    """

    def __init__(self, folder: Path, *, start_step: int, use_tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / CSV_FILE
        self._rows = [row for row in _read(self.path) if int(row["step"]) <= start_step]
        self._columns = list(self._rows[0]) if self._rows else ["step"]
        self._events = _tensorboard(folder, start_step) if use_tensorboard else None
        self._rewrite()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the line of `step`."""
        row = {"step": str(step)} | {name: f"{value:.8g}" for name, value in values.items()}
        self._rows.append(row)
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self._events is not None:
            self._events.close()

    def _rewrite(self) -> None:
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # a line that a crash cut off has fewer fields
        return [row for row in csv.DictReader(file) if None not in row.values() and (row.get("step") or "").isdigit()]


def _tensorboard(folder: Path, start_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
