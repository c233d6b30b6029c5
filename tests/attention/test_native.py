"""`native` against `reference`: outputs, log-sum-exp and all gradients, in float32 and bfloat16, and its limits.

The kernels have no float64, so that the truth is the reference in float64 and the tolerance its error in low precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.cases import BASE, CALIBRATED, CASES, Case, inputs
from tests.attention.exactness import assert_exact, in_float64, round_scores
from tests.attention.test_definition import any_case
from tests.attention.test_implementations import KINDS, LENGTHS
from tests.attention.test_limits import EVERYTHING, _constant_in_regions, dense
from trilevel.attention import library
from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.attention.native import build

pytestmark = pytest.mark.skipif(not library.is_available(), reason=f"no native library: {build.AGAIN}")

DTYPES = [torch.float32, torch.bfloat16]
WAYS = pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
# products and sums in float32 of numbers around 1
TOLERANCE = 1e-5
LOCAL, REGIONAL, GLOBAL = LevelRatio(1, 0, 0), LevelRatio(0, 1, 0), LevelRatio(0, 0, 1)


def low(case: Case, dtype: torch.dtype = torch.float32, seed: int = 7) -> dict[str, Any]:
    return round_scores(inputs(case, dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: Case, dtype: torch.dtype) -> None:
    assert_exact(low(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind: str, tokens: int, dtype: torch.dtype) -> None:
    assert_exact(low(Case(name=kind, tokens=tokens, dim=8, **KINDS[kind]), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", [None, ((31, 1, 64), (97, 0, 2, 5))], ids=["one", "packed"])
@pytest.mark.parametrize("padding", [None, "left", "middle", "scattered", "whole_row"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str, padding: str | None, segments: Any, dtype: torch.dtype) -> None:
    assert_exact(low(Case(name=kind, tokens=131, dim=7, padding=padding, segments=segments, **KINDS[kind]), dtype))


@settings(max_examples=150)
@given(case=any_case(), dim=st.sampled_from([1, 3, 8, 17, 33]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_combination(case: Case, dim: int, dtype: torch.dtype, seed: int) -> None:
    assert_exact(low(replace(case, dim=dim), dtype, seed))


@st.composite
def any_longer_case(draw: st.DrawFn) -> Case:
    """Lengths of several tiles, windows and regions that end anywhere in them."""
    case = draw(any_case())
    tokens = draw(st.integers(18, 150))
    size = draw(st.integers(1, 60))
    levels = replace(
        case.levels,
        window=2 * draw(st.integers(0, 80)) + 1,
        region_size=size if case.levels.region_size else None,
        num_regions=None if case.levels.region_size else size,
        num_global_tokens=draw(st.integers(1, 70)),
        num_sinks=0 if case.levels.mode == "strict" else draw(st.integers(0, 20)),
        selection_chunk=draw(st.none() | st.integers(1, 40)) if case.is_causal else None,
    )
    lengths = st.lists(st.integers(0, 60), max_size=4).map(tuple)
    segments = draw(st.none() | st.tuples(lengths, lengths))
    return replace(case, tokens=tokens, levels=levels, segments=segments, dim=draw(st.sampled_from([5, 16, 40])))


@settings(max_examples=60)
@given(case=any_longer_case(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_longer_combination(case: Case, dtype: torch.dtype, seed: int) -> None:
    assert_exact(low(case, dtype, seed))


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=500)
@given(case=any_longer_case(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9_999))
def test_many_longer_combinations(case: Case, dtype: torch.dtype, seed: int) -> None:
    assert_exact(low(case, dtype, seed))


# several items of 16 tiles for each head, so that sums, halos and parts meet
LARGE_LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=33, region_size=64, num_global_tokens=31)
LARGE = [
    Case(name="window_1", tokens=521, dim=16, batch=1, levels=replace(LARGE_LEVELS, window=1, region_size=7)),
    Case(name="grouped", tokens=521, dim=17, batch=1, heads=6, levels=LARGE_LEVELS, padding="scattered"),
    Case(name="window_257", tokens=521, dim=64, batch=1, levels=replace(LARGE_LEVELS, window=257, union=True)),
    Case(name="sinks", tokens=521, dim=80, batch=1, levels=replace(LARGE_LEVELS, num_sinks=5), segments=((300, 7),)),
    Case(name="dim_96", tokens=521, dim=96, batch=1, levels=replace(LARGE_LEVELS, window=65), padding="left"),
    Case(name="dim_128", tokens=521, dim=128, batch=1, levels=replace(LARGE_LEVELS, selection_gradient="gate")),
    Case(name="dim_256", tokens=521, dim=256, batch=1, levels=LARGE_LEVELS),
]
LONG = [
    *(
        Case(name=f"window_{window}_dim_{dim}", tokens=tokens, dim=dim, batch=1, heads=heads, levels=levels)
        for tokens in (521, 1031)
        for window in (1, 33, 257, 1025)
        for dim, heads in ((5, 6), (16, 3), (17, 3), (64, 6), (80, 3), (96, 3), (128, 3), (256, 3))
        for levels in [replace(LARGE_LEVELS, window=window, union=dim in (17, 64), num_sinks=dim % 5)]
    ),
    # a set of global tokens changes every few tokens
    Case(name="chunk_3", tokens=1031, dim=16, batch=1, levels=replace(LARGE_LEVELS, selection_chunk=3)),
    Case(name="segments", tokens=1031, dim=16, levels=LARGE_LEVELS, segments=((257, 1, 511), (16, 0, 999, 3))),
]


@WAYS
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(case: Case, is_causal: bool) -> None:
    assert_exact(low(replace(case, is_causal=is_causal)))


@WAYS
@pytest.mark.parametrize("case", LARGE[1:4], ids=str)
def test_large_in_bfloat16(case: Case, is_causal: bool) -> None:
    assert_exact(low(replace(case, is_causal=is_causal), torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@WAYS
@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case}-{case.tokens}")
def test_long(case: Case, is_causal: bool, dtype: torch.dtype) -> None:
    assert_exact(low(replace(case, is_causal=is_causal), dtype))


@pytest.mark.parametrize("padding", [None, "right", "left"])
@WAYS
@pytest.mark.parametrize("name", [name for name, levels in EVERYTHING.items() if levels.mode == "calibrated"])
def test_seeing_everything_is_dense(name: str, is_causal: bool, padding: str | None) -> None:
    case = Case(name=name, levels=EVERYTHING[name], heads=6, kv_heads=3, is_causal=is_causal, padding=padding)
    arguments = inputs(case, torch.float32)
    found = multi_level_attention(**arguments, impl="native", return_lse=True)
    for one, wanted in zip(found, dense(in_float64(arguments)), strict=True):
        torch.testing.assert_close(one, wanted.float(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CALIBRATED, ids=str)
def test_the_average_of_ones_is_one(case: Case, dtype: torch.dtype) -> None:
    arguments = inputs(case, dtype)
    arguments["value"] = torch.ones_like(arguments["value"])
    out, lse = multi_level_attention(**arguments, impl="native", return_lse=True)
    tolerance = TOLERANCE if dtype == torch.float32 else float(torch.finfo(dtype).eps)
    torch.testing.assert_close(out, lse.isfinite().to(dtype)[..., None].expand_as(out), rtol=tolerance, atol=0)


@pytest.mark.parametrize("window", [1, 3, 11])
@pytest.mark.parametrize("region_size", [4, 5])
def test_constant_regions_are_exact(region_size: int, window: int) -> None:
    levels = replace(BASE, ratio=LevelRatio(0, 1, 1), region_size=region_size, window=window, union=True)
    arguments = inputs(Case(name="constant", levels=levels), torch.float32)
    for name in ("key", "value"):
        arguments[name] = _constant_in_regions(arguments[name], region_size)
    found = multi_level_attention(**arguments, impl="native", return_lse=True)
    for one, wanted in zip(found, dense(in_float64(arguments)), strict=True):
        torch.testing.assert_close(one, wanted.float(), rtol=TOLERANCE, atol=TOLERANCE)


@WAYS
def test_constant_keys_and_values_make_the_remainder_exact(is_causal: bool) -> None:
    arguments = inputs(Case(name="constant", is_causal=is_causal, padding="scattered", tokens=53), torch.float32)
    for name in ("key", "value"):
        arguments[name] = arguments[name][:, :, :1].expand_as(arguments[name])
    found = multi_level_attention(**arguments, impl="native", return_lse=True)
    for one, wanted in zip(found, dense(in_float64(arguments)), strict=True):
        torch.testing.assert_close(one, wanted.float(), rtol=TOLERANCE, atol=TOLERANCE)
