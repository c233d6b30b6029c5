"""`blocked` without gradients against `reference`: streamed, and windows by torch's fused kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.attention.cases import Case, inputs
from tests.attention.test_implementations import KINDS, LENGTHS, LEVELS, _spread
from trilevel.attention import near
from trilevel.attention.api import multi_level_attention
from trilevel.attention.impl import blocked
from trilevel.attention.levels import LevelRatio

WINDOWS_ALONE = replace(LEVELS, mode="strict", ratio=LevelRatio(1, 0, 0))
STREAMED = {**KINDS, "windows": {"levels": WINDOWS_ALONE}, "wide": {"levels": replace(WINDOWS_ALONE, window=131)}}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and runs of one or two blocks, so that short inputs have many."""
    monkeypatch.setattr(blocked, "STEP_LOGITS", 5_000)
    monkeypatch.setattr(near, "RUN_ELEMENTS", 2_000)


def assert_same(arguments: dict[str, Any], tolerance: float = 1e-11) -> None:
    with torch.no_grad():
        found = multi_level_attention(**arguments, impl="blocked")
        with_lse = multi_level_attention(**arguments, impl="blocked", return_lse=True)
        wanted = multi_level_attention(**arguments, impl="reference", return_lse=True)
    for one, other in zip((found, *with_lse), (wanted[0], *wanted), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", STREAMED)
def test_lengths(kind: str, tokens: int) -> None:
    assert_same(inputs(Case(name=kind, tokens=tokens, **STREAMED[kind])))


@pytest.mark.parametrize("padding", ["left", "scattered", "whole_row"])
@pytest.mark.parametrize("kind", STREAMED)
def test_padding(kind: str, padding: str) -> None:
    assert_same(inputs(Case(name=kind, tokens=131, padding=padding, **STREAMED[kind])))


@pytest.mark.parametrize("kind", STREAMED)
def test_segments(kind: str) -> None:
    rows = ((31, 1, 64), (97, 0, 2, 5))
    assert_same(inputs(Case(name=kind, tokens=131, segments=rows, padding="scattered", **STREAMED[kind])))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["windows", "wide"])
def test_windows_of_grouped_heads_with_own_scale(kind: str, kv_heads: int) -> None:
    assert_same(inputs(Case(name=kind, tokens=211, heads=6, kv_heads=kv_heads, scale=0.37, **STREAMED[kind])))


@pytest.mark.parametrize("kind", STREAMED)
def test_grouped_heads(kind: str) -> None:
    assert_same(inputs(Case(name=kind, tokens=101, heads=10, kv_heads=5, **STREAMED[kind])))


@pytest.mark.parametrize("kind", STREAMED)
def test_strides_do_not_matter(kind: str) -> None:
    arguments = inputs(Case(name=kind, tokens=101, **STREAMED[kind]))
    spread = {**arguments, **{name: _spread(arguments[name]) for name in ("query", "key", "value")}}
    assert_same(spread)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("kind", STREAMED)
def test_low_precision_errs_no_more_than_twice_the_reference(
    kind: str, padding: str | None, dtype: torch.dtype
) -> None:
    # sums of scores are rounded before tokens are selected: one addend keeps the selection the same
    case = Case(name=kind, tokens=131, dim=8, padding=padding, without=("global_prior",), **STREAMED[kind])
    low = inputs(case, dtype)
    high: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in low.items()
    }
    with torch.no_grad():
        found = multi_level_attention(**low, impl="blocked")
        eager = multi_level_attention(**low, impl="reference")
        true = multi_level_attention(**high, impl="reference")
    assert found.dtype == dtype
    allowed = 2 * (eager.double() - true).abs().max() + torch.finfo(dtype).eps * true.abs().max()
    assert (found.double() - true).abs().max() <= allowed


# one block at each end of the row reaches beyond it
@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.float16, 7), (torch.float64, 2 if torch.backends.mkl.is_available() else 7)]
)
def test_the_fused_kernel_runs_the_windows_without_fast_products(
    dtype: torch.dtype, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr("trilevel.attention.near.scaled_dot_product_attention", counted)
    arguments = inputs(Case(name="windows", tokens=211, **STREAMED["windows"]), dtype)
    with torch.no_grad():
        multi_level_attention(**arguments, impl="blocked")
    # 211 tokens in 7 blocks of 32, the last one filled up, both rows of the batch
    assert sum(blocks for blocks, *_ in calls) == 2 * fused
    assert all(shape[1:] == (3, 32, 5) for shape in calls)


@pytest.mark.parametrize("padding", [None, "left", "scattered"])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("kind", ["windows", "wide"])
def test_fused_windows(kind: str, kv_heads: int, padding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "has_fast_products", lambda _: False)
    case = Case(name=kind, tokens=211, kv_heads=kv_heads, padding=padding, scale=0.37, **STREAMED[kind])
    assert_same(inputs(case))
