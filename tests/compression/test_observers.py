"""Ranges of activations: against all the data at once, and against every candidate tried."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trilevel.compression.observers import (
    BINS,
    LIMITS,
    SHRINKS,
    Grid,
    Histogram,
    Method,
    grid_of,
    make_observer,
    squared_error,
)
from trilevel.errors import ConfigError, InputError

GRIDS: list[Grid] = ["int8", "uint8"]


def batches() -> list[Tensor]:
    """Lengths that differ, an outlier in one batch only, and zeros."""
    parts = [torch.nn.functional.gelu(torch.randn(n, 11) * 2) for n in (3, 71, 29, 5_003)]
    parts[2][5, 3] = 23.0
    parts[1][:7] = 0
    return parts


def seen(method: Method, parts: list[Tensor], percentile: float = 99.0) -> dict[Grid, tuple[float, float]]:
    observer = make_observer(method, percentile=percentile)
    for part in parts:
        observer.update(part)
    return {grid: observer.range(grid) for grid in GRIDS}


def error_of(x: Tensor, low: float, high: float, grid: Grid) -> float:
    """Squared error of all numbers, by torch's own fake quantization in float64 arithmetic."""
    scale, zero = grid_of(low, high, grid)
    smallest, largest = LIMITS[grid]
    grids = ((x.double() / scale).round() + zero).clamp(smallest, largest)
    return float(((grids - zero) * scale - x.double()).square().sum())


def test_minmax_is_the_range_of_all_data() -> None:
    parts = batches()
    everything = torch.cat(parts)
    for grid, found in seen("minmax", parts).items():
        assert found == (float(everything.min()), float(everything.max())), grid
    assert seen("minmax", [torch.rand(5) + 1])["uint8"][0] == 0


@pytest.mark.parametrize("percentile", [75.0, 99.0, 99.9, 100.0])
def test_percentile_against_sorting(percentile: float) -> None:
    parts = batches()
    numbers = np.sort(torch.cat(parts).flatten().double().numpy())
    found = seen("percentile", parts, percentile)
    width = 32 / BINS
    kept = math.ceil(percentile / 100 * numbers.size)
    size = np.sort(np.abs(numbers))[kept - 1]
    assert found["int8"][1] == -found["int8"][0]
    assert 0 <= found["int8"][1] - size <= width
    low = numbers[max(1, math.ceil((1 - percentile / 100) * numbers.size - 1e-9)) - 1]
    assert 0 <= found["uint8"][1] - max(0.0, numbers[kept - 1]) <= width
    assert 0 <= found["uint8"][0] - min(0.0, low) <= width


def test_mse_int8_against_every_candidate() -> None:
    parts = batches()
    x = torch.cat(parts)
    found = seen("mse", parts)["int8"]
    top = float(x.abs().max())
    errors = [error_of(x, -top * s, top * s, "int8") for s in SHRINKS.tolist()]
    assert error_of(x, *found, "int8") <= 1.01 * min(errors)
    # one outlier is not worth the range
    assert found[1] < 20


def test_mse_uint8_against_every_pair() -> None:
    parts = batches()
    x = torch.cat(parts)
    found = seen("mse", parts)["uint8"]
    low, high = float(x.min()), float(x.max())
    shares = SHRINKS[:48:3].tolist()
    errors = [error_of(x, low * a, high * b, "uint8") for a in shares for b in shares]
    assert error_of(x, *found, "uint8") <= 1.01 * min(errors)
    assert error_of(x, *found, "uint8") < error_of(x, low, high, "uint8") * 0.9


def test_the_error_of_the_histogram_is_that_of_the_data() -> None:
    x = torch.cat(batches())
    histogram = Histogram()
    histogram.update(x)
    for grid in GRIDS:
        for share in (1.0, 0.3):
            low, high = float(x.min()) * share, float(x.max()) * share
            assert squared_error(histogram.points(), low, high, grid) == pytest.approx(
                error_of(x, low, high, grid), rel=0.02
            )


@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40), st.data())
def test_counts_do_not_depend_on_order_and_batches(numbers: list[float], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(numbers))
    cut = data.draw(st.integers(0, len(numbers)))
    one, other = Histogram(), Histogram()
    one.update(torch.tensor(numbers))
    other.update(torch.tensor(shuffled[:cut]))
    other.update(torch.tensor(shuffled[cut:]))
    assert torch.equal(one.counts, other.counts)
    assert (one.exponent, one.num_zeros) == (other.exponent, other.num_zeros)
    assert int(one.counts.sum()) + one.num_zeros == len(numbers)


def test_memory_does_not_grow() -> None:
    histogram = Histogram()
    for exponent in (-90, -3, 0, 5, 90):
        histogram.update(torch.randn(1_000) * 2.0**exponent)
        assert histogram.counts.shape == (2 * BINS,)
    assert int(histogram.counts.sum()) == 5_000


def test_bfloat16_and_empty_batches_count() -> None:
    found = seen("mse", [torch.randn(64).bfloat16(), torch.empty(0, 3)])
    assert found["int8"][1] > 0


def test_only_zeros_make_a_grid() -> None:
    for method in ("minmax", "percentile", "mse"):
        low, high = seen(method, [torch.zeros(5)])["uint8"]
        assert grid_of(low, high, "uint8") == (1.0, 0)


@given(st.floats(-100, 100), st.floats(-100, 100), st.sampled_from(GRIDS))
def test_the_grid_holds_zero_and_reaches_both_ends(one: float, other: float, grid: Grid) -> None:
    low, high = min(one, other), max(one, other)
    scale, zero = grid_of(low, high, grid)
    smallest, largest = LIMITS[grid]
    assert smallest <= zero <= largest
    assert (largest - zero) * scale >= high - scale * 0.51
    assert (smallest - zero) * scale <= low + scale * 0.51


def test_errors_say_what_is_needed() -> None:
    with pytest.raises(ConfigError, match="observer='median' is unknown; known are minmax, percentile, mse"):
        make_observer("median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"percentile=50\.0 must be above 50"):
        make_observer("percentile", percentile=50.0)
    for method in ("minmax", "percentile", "mse"):
        with pytest.raises(InputError, match="not finite"):
            seen(method, [torch.tensor([1.0, math.inf])])
        with pytest.raises(InputError, match="saw no numbers"):
            seen(method, [])
