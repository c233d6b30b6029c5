"""The level ratio and the sizes of the levels."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.attention.oracle import split_heads
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError


@pytest.mark.parametrize(
    ("shares", "heads", "kv_heads", "wanted"),
    [
        ((6, 3, 1), 12, None, (7, 4, 1)),
        ((6, 3, 1), 8, None, (5, 2, 1)),
        ((6, 3, 1), 10, None, (6, 3, 1)),
        ((6, 3, 1), 3, None, (1, 1, 1)),
        ((6, 3, 1), 4, None, (2, 1, 1)),
        ((6, 3, 1), 16, None, (10, 5, 1)),
        ((4, 4, 2), 12, None, (5, 5, 2)),
        ((4, 4, 2), 6, None, (3, 2, 1)),
        ((1, 1, 1), 4, None, (2, 1, 1)),
        ((1, 1, 1), 5, None, (2, 2, 1)),
        ((1, 0, 0), 7, None, (7, 0, 0)),
        ((0, 0, 0.1), 7, None, (0, 0, 7)),
        ((99, 0, 1), 5, None, (4, 0, 1)),
        ((0.6, 0.3, 0.1), 12, None, (7, 4, 1)),
        ((6, 3, 1), 12, 12, (7, 4, 1)),
        ((6, 3, 1), 12, 4, (6, 3, 3)),
        ((6, 3, 1), 12, 3, (4, 4, 4)),
        ((1, 0, 1), 12, 2, (6, 0, 6)),
        ((1, 0, 0), 12, 1, (12, 0, 0)),
    ],
)
def test_split(shares: tuple[float, float, float], heads: int, kv_heads: int | None, wanted: tuple[int, ...]) -> None:
    assert tuple(LevelRatio(*shares).split(heads, kv_heads)) == wanted


@given(
    shares=st.tuples(*[st.sampled_from([0, 0, 1, 2, 3, 6, 0.5, 0.01])] * 3).filter(any),
    kv_heads=st.integers(1, 17),
    group=st.sampled_from([1, 2, 3]),
)
def test_split_is_that_of_the_oracle(shares: tuple[float, float, float], kv_heads: int, group: int) -> None:
    ratio = LevelRatio(*shares)
    if kv_heads < sum(share > 0 for share in shares):
        with pytest.raises(ConfigError, match="non-zero shares"):
            ratio.split(kv_heads * group, kv_heads)
        return
    split = ratio.split(kv_heads * group, kv_heads)
    assert tuple(split) == split_heads(shares, kv_heads * group, kv_heads)
    assert sum(split) == kv_heads * group
    assert all((count > 0) == (share > 0) for count, share in zip(split, shares, strict=True))
    assert all(count % group == 0 for count in split)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (2, None, "3 non-zero shares.*got 2.*Use more heads or set a share to 0"),
        (12, 2, "3 non-zero shares.*got 2"),
        (12, 5, "num_heads=12.*multiple of num_kv_heads=5"),
        (0, None, "num_heads=0"),
    ],
)
def test_split_says_what_cannot_be_shared(heads: int, kv_heads: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LevelRatio(6, 3, 1).split(heads, kv_heads)


@pytest.mark.parametrize("shares", [(0, 0, 0), (-1, 1, 1), (float("nan"), 1, 1), (float("inf"), 1, 1)])
def test_ratio_refuses_shares_that_are_none(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="every share must be finite and >= 0 and one of them > 0"):
        LevelRatio(*shares)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "sparse"}, "mode='sparse'.*'calibrated'.*'strict'"),
        ({"selection_gradient": "none"}, "selection_gradient='none'.*'straight_through'.*'gate'"),
        ({"window": 32}, "window=32 must be odd"),
        ({"window": -1}, "window=-1 must be odd and >= 1"),
        ({"region_size": None}, "exactly one of region_size=None and num_regions=None"),
        ({"num_regions": 8}, "exactly one of region_size=64 and num_regions=8.*set the other to None"),
        ({"region_size": 0}, "region_size=0 must be >= 1"),
        ({"region_size": None, "num_regions": 0}, "num_regions=0 must be >= 1"),
        ({"num_global_tokens": 0}, "num_global_tokens=0 must be >= 1"),
        ({"selection_chunk": 0}, "selection_chunk=0 must be >= 1"),
        ({"dense_below": 0}, "dense_below=0 must be >= 1"),
        ({"num_sinks": -1}, "num_sinks=-1 must be >= 0"),
        ({"mode": "strict", "union": True}, "union and num_sinks belong to mode='calibrated'"),
        ({"mode": "strict", "num_sinks": 1}, "union and num_sinks belong to mode='calibrated'"),
    ],
)
def test_levels_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Levels(**values)


def test_derived_sizes() -> None:
    levels = Levels(window=33)
    assert (levels.radius, levels.chunk) == (16, 17)
    assert Levels(window=1, selection_chunk=7).chunk == 7
