"""Ranges of activations from calibration data: batch by batch, in memory that does not grow with the data."""

from __future__ import annotations

import math
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from trilevel.errors import ConfigError, InputError

Grid = Literal["int8", "uint8"]
"""`int8`: -128..127 around 0, the scale from 127 steps to the larger end; `uint8`: 0..255 with a zero point.

-128 is in the grid since that is where runtimes saturate."""
Method = Literal["minmax", "percentile", "mse"]
LIMITS: dict[Grid, tuple[int, int]] = {"int8": (-128, 127), "uint8": (0, 255)}
BINS = 8_192
"""Bins on each side of 0."""
SMALLEST_EXPONENT = -100
SHRINKS = 2.0 ** (-torch.arange(0, 97, dtype=torch.float64) / 16)
"""Shares of the full range that the search tries, 1 to 1/64 in steps of 4 %."""


class Observer(Protocol):
    """Sees tensors one after another and then names a range that holds 0."""

    @property
    def is_empty(self) -> bool:
        """Whether it saw no number yet."""

    def update(self, x: Tensor) -> None:
        """Take in all numbers of `x`, of any shape."""

    def range(self, grid: Grid) -> tuple[float, float]:
        """The lower and upper end to be quantized; what lies outside is clamped."""


def make_observer(method: Method, *, percentile: float = 99.999) -> Observer:
    """An observer that has seen nothing.

    Args:
        method: `minmax` keeps everything; `percentile` cuts the rarest (for `int8` of the absolute values, for `uint8`
            at each end); `mse` searches the range whose rounding and clamping has the smallest squared error.
        percentile: share that `percentile` keeps, in per cent.

    Raises:
        ConfigError: an unknown method, or a percentile outside (50, 100].
    """
    if method == "minmax":
        return _MinMax()
    if method == "percentile":
        return _Percentile(check_percentile(percentile))
    if method == "mse":
        return _MeanSquare()
    raise ConfigError(f"observer={method!r} is unknown; known are {', '.join(get_args(Method))}.")


def check_percentile(percentile: float) -> float:
    """Return it, or raise `ConfigError`."""
    if not 50 < percentile <= 100:
        raise ConfigError(f"percentile={percentile} must be above 50 and at most 100.")
    return percentile


def grid_of(low: float, high: float, grid: Grid) -> tuple[float, int]:
    """Scale and zero point for numbers from `low` to `high`; the range is widened to hold 0.

    >>> grid_of(-1.27, 0.5, "int8")
    (0.01, 0)
    >>> grid_of(-0.1, 0.41, "uint8")
    (0.002, 50)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1.0, 0
    if grid == "int8":
        return max(-low, high) / 127, 0
    scale = (high - low) / 255
    return scale, min(255, max(0, round(-low / scale)))


class Histogram:
    """Counts of numbers by value; zeros are counted apart, as every grid holds 0.

    The bins divide a power of two, which doubles when a larger number comes: the counts depend on the numbers alone,
    not on their order or batches.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.bins = bins
        self.counts = torch.zeros(2 * bins, dtype=torch.int64)
        self.exponent = SMALLEST_EXPONENT
        self.num_zeros = 0
        self.low = math.inf
        self.high = -math.inf

    def update(self, x: Tensor) -> None:
        """Count all numbers of `x`.

        Raises:
            InputError: a number is not finite.
        """
        low, high = _ends(x)
        if low > high:
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        values = x.detach().flatten().double()
        values = values[values != 0]
        self.num_zeros += x.numel() - values.numel()
        # |x| < 2 ** exponent
        self._grow(math.frexp(max(-low, high))[1])
        index = (values * (self.bins / 2.0**self.exponent)).floor().long() + self.bins
        counted = torch.bincount(index.clamp(0, 2 * self.bins - 1), minlength=2 * self.bins)
        self.counts += counted.to(self.counts.device)

    def _grow(self, exponent: int) -> None:
        step = exponent - self.exponent
        if step <= 0:
            return
        # shifts round down, so negative numbers keep their bins as well
        index = (torch.arange(-self.bins, self.bins) >> min(step, 62)) + self.bins
        self.counts = torch.zeros_like(self.counts).index_add_(0, index, self.counts)
        self.exponent = exponent

    @property
    def width(self) -> float:
        """Of a bin."""
        return float(2.0**self.exponent / self.bins)

    def points(self) -> tuple[Tensor, Tensor]:
        """Centres of the bins that hold something, and their counts; float64 `(bins,)` each."""
        index = self.counts.nonzero().squeeze(1)
        centres = (index.double() - self.bins + 0.5) * self.width
        return centres.clamp(self.low, self.high), self.counts[index].double()

    def quantile(self, share: float) -> float:
        """The upper end of the bin below which `share` of all numbers lie, zeros counted."""
        edges, counts = self._with_zeros(torch.arange(1 - self.bins, self.bins + 1).double() * self.width, self.counts)
        return min(self.high, max(self.low, _quantile(edges, counts, share)))

    def absolute_quantile(self, share: float) -> float:
        """The same of the absolute values."""
        both = self.counts[self.bins :] + self.counts[: self.bins].flip(0)
        edges = torch.arange(1, self.bins + 1).double() * self.width
        edges, counts = torch.cat([torch.zeros(1).double(), edges]), torch.cat([torch.tensor([self.num_zeros]), both])
        return min(max(-self.low, self.high), _quantile(edges, counts, share))

    def _with_zeros(self, edges: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        below, above = edges[: self.bins], edges[self.bins :]
        zero = torch.zeros(1).double(), torch.tensor([self.num_zeros])
        return (
            torch.cat([below, zero[0], above]),
            torch.cat([counts[: self.bins], zero[1], counts[self.bins :]]),
        )


def _quantile(edges: Tensor, counts: Tensor, share: float) -> float:
    total = counts.cumsum(0)
    # the smallest edge with enough below it; a whole number of items, so that 100 % is all of them
    wanted = math.ceil(share * int(total[-1]) - 1e-9)
    return float(edges[int(torch.searchsorted(total, max(1, wanted)))])


def _ends(x: Tensor) -> tuple[float, float]:
    if not x.numel():
        return math.inf, -math.inf
    low, high = (float(end) for end in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError("calibration data gives activations that are not finite. Check the batches and the model.")
    return low, high


def _check_seen(observer: Observer) -> None:
    if observer.is_empty:
        raise InputError("an observer saw no numbers. Give calibration batches that run the layer.")


class _MinMax:
    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        low, high = _ends(x)
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def is_empty(self) -> bool:
        return self.low > self.high

    def range(self, grid: Grid) -> tuple[float, float]:
        _check_seen(self)
        return min(self.low, 0.0), max(self.high, 0.0)


class _Percentile:
    def __init__(self, percentile: float) -> None:
        self.share = percentile / 100
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    @property
    def is_empty(self) -> bool:
        return self.histogram.low > self.histogram.high

    def range(self, grid: Grid) -> tuple[float, float]:
        _check_seen(self)
        if grid == "int8":
            end = self.histogram.absolute_quantile(self.share)
            return -end, end
        low, high = self.histogram.quantile(1 - self.share), self.histogram.quantile(self.share)
        return min(low, 0.0), max(high, 0.0)


class _MeanSquare:
    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: Tensor) -> None:
        self.histogram.update(x)

    @property
    def is_empty(self) -> bool:
        return self.histogram.low > self.histogram.high

    def range(self, grid: Grid) -> tuple[float, float]:
        _check_seen(self)
        low, high = min(self.histogram.low, 0.0), max(self.histogram.high, 0.0)
        points = self.histogram.points()
        if grid == "int8":
            end = max(-low, high) * SHRINKS
            return _best(points, -end, end, grid)
        # both ends together, then each in turn
        start = _best(points, low * SHRINKS, high * SHRINKS, grid)
        for _ in range(2):
            start = _best(points, torch.full_like(SHRINKS, start[0]), high * SHRINKS, grid)
            start = _best(points, low * SHRINKS, torch.full_like(SHRINKS, start[1]), grid)
        return start


def _best(points: tuple[Tensor, Tensor], low: Tensor, high: Tensor, grid: Grid) -> tuple[float, float]:
    errors = [squared_error(points, one, other, grid) for one, other in zip(low.tolist(), high.tolist(), strict=True)]
    index = min(range(len(errors)), key=errors.__getitem__)
    return float(low[index]), float(high[index])


def squared_error(points: tuple[Tensor, Tensor], low: float, high: float, grid: Grid) -> float:
    """What quantizing does to `points` (values, how often each): the sum of squared differences."""
    values, counts = points
    scale, zero = grid_of(low, high, grid)
    smallest, largest = LIMITS[grid]
    rounded = ((values / scale).round() + zero).clamp(smallest, largest).sub(zero).mul(scale)
    return float(((rounded - values).square() * counts).sum())
