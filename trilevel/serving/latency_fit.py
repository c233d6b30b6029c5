"""What a batch of a queue takes: seconds `a + b * rows`, fitted again with every batch that ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np

_FORGET = 0.95
_LEAST_SAMPLES = 4
# of the squared mean: below this the sizes that ran are too alike to tell the slope from the constant
_LEAST_SPREAD = 0.01
_STEP = 0.2


@final
class LatencyFit:
    """A line through the latest batches, from what was measured before if that is known.

    Where all batches have about one size, the line keeps its shape and follows by a factor alone.

    Args:
        rows, seconds: of batches that were measured before; none where nothing is known.
    """

    def __init__(self, rows: Sequence[int] = (), seconds: Sequence[float] = ()) -> None:
        self.a = self.b = 0.0
        self.largest = 0
        self._sums = np.zeros(5)
        if len(rows):
            slope, constant = np.polyfit(rows, seconds, 1) if len(rows) > 1 else (seconds[0] / rows[0], 0.0)
            # times that curve may put the constant below 0
            self.b = float(slope) if constant >= 0 and slope > 0 else float(np.mean(np.divide(seconds, rows)))
            self.a = max(0.0, float(constant)) if self.b == slope else 0.0
            self.largest = max(rows)

    @property
    def is_known(self) -> bool:
        """Whether anything was ever measured."""
        return self.largest > 0

    def seconds(self, rows: int) -> float:
        """Predicted; 0 if nothing is known."""
        return self.a + self.b * rows

    def most_rows(self, seconds: float) -> int:
        """The largest batch that ends within so many seconds, 0 if none does."""
        if seconds <= self.a:
            return 0
        return int(min((seconds - self.a) / self.b, 1e9)) if self.b > 0 else 10**9

    def saw(self, rows: int, seconds: float) -> None:
        """Count a batch that ran."""
        self._sums = self._sums * _FORGET + np.array((1.0, rows, rows * rows, seconds, rows * seconds))
        count, x, xx, y, xy = self._sums.tolist()
        mean, spread = x / count, xx / count - (x / count) ** 2
        if not self.is_known:
            self.b = seconds / rows
        elif count > _LEAST_SAMPLES * _FORGET**_LEAST_SAMPLES and spread > _LEAST_SPREAD * mean * mean:
            slope = (xy / count - mean * y / count) / spread
            # neither the constant nor the slope of a cost is negative
            slope = min(max(slope, 0.0), y / x)
            self.a, self.b = y / count - slope * mean, slope
        else:
            factor = (max(seconds, 1e-9) / max(self.seconds(rows), 1e-9)) ** _STEP
            self.a, self.b = self.a * factor, self.b * factor
        self.largest = max(self.largest, rows)
