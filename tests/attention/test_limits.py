"""Where a level sees everything it is dense attention; where nothing varies the summaries are exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attention.cases import BASE, CALIBRATED, IMPLEMENTATIONS, STRICT, Case, inputs
from tests.attention.oracle import split_heads
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

LOCAL, REGIONAL, GLOBAL = LevelRatio(1, 0, 0), LevelRatio(0, 1, 0), LevelRatio(0, 0, 1)
EVERYTHING = {
    "window": replace(BASE, window=37),
    "window_union": replace(BASE, window=37, union=True),
    "sinks": replace(BASE, ratio=LOCAL, num_sinks=19),
    "regions_of_1": replace(BASE, ratio=REGIONAL, region_size=1),
    "regions_of_1_window_1": replace(BASE, ratio=REGIONAL, region_size=1, window=1),
    "regions_of_1_union": replace(BASE, ratio=GLOBAL, region_size=1, union=True),
    "all_global": replace(BASE, ratio=GLOBAL, num_global_tokens=19),
    "all_global_window_1": replace(BASE, ratio=GLOBAL, num_global_tokens=19, window=1),
    "all_global_union": replace(BASE, ratio=GLOBAL, num_global_tokens=19, union=True),
    "dense_below": replace(BASE, dense_below=20),
    "dense_below_strict": replace(STRICT, dense_below=20),
}


def attend(arguments: dict[str, Any], impl: Impl) -> tuple[Tensor, Tensor]:
    return multi_level_attention(**arguments, impl=impl, return_lse=True)


def dense(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """SDPA and the log-sum-exp of its logits; rows of padding are zero and -inf."""
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    tokens = query.shape[2]
    seen = torch.ones(query.shape[0], 1, tokens, tokens, dtype=torch.bool)
    if arguments["is_causal"]:
        seen = seen.tril()
    real = torch.ones(query.shape[0], tokens, dtype=torch.bool)
    if "padding_mask" in arguments:
        real = ~arguments["padding_mask"]
        seen = seen & real[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key, value, seen, scale=arguments["scale"], enable_gqa=True)
    scale = query.shape[-1] ** -0.5 if arguments["scale"] is None else arguments["scale"]
    logits = scale * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    lse = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return out * real[:, None, :, None], lse.masked_fill(~real[:, None], -torch.inf)


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_seeing_everything_is_dense(impl: Impl, name: str, is_causal: bool, padding: str | None) -> None:
    levels = EVERYTHING[name]
    if is_causal and levels.mode == "strict":
        return  # strict is bidirectional; that it says so is in test_messages
    arguments = inputs(Case(name=name, levels=levels, heads=6, kv_heads=3, is_causal=is_causal, padding=padding))
    out, lse = attend(arguments, impl)
    wanted_out, wanted_lse = dense(arguments)
    torch.testing.assert_close(out, wanted_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strict_levels_that_see_everything_are_dense(impl: Impl) -> None:
    levels = replace(STRICT, window=37, region_size=1, num_global_tokens=19)
    arguments = inputs(Case(name="strict", levels=levels, padding="right", extras=False))
    for found, wanted in zip(attend(arguments, impl), dense(arguments), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CALIBRATED, ids=str)
def test_the_average_of_ones_is_one(case: Case, impl: Impl) -> None:
    arguments = inputs(case)
    arguments["value"] = torch.ones_like(arguments["value"])
    out, lse = attend(arguments, impl)
    torch.testing.assert_close(out, lse.isfinite().to(out.dtype)[..., None].expand_as(out), rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strict_average_of_ones_is_one_where_a_head_sees_something(impl: Impl) -> None:
    arguments = inputs(Case(name="strict", levels=STRICT, padding="scattered", without=("region_gate",)))
    arguments["value"] = torch.ones_like(arguments["value"])
    out, lse = attend(arguments, impl)
    torch.testing.assert_close(out, lse.isfinite().to(out.dtype)[..., None].expand_as(out), rtol=1e-12, atol=0)
    # three global tokens a row, and some tokens that are not
    assert lse[:, 2].isfinite().sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [c for c in CALIBRATED if c.levels.selection_gradient != "gate"], ids=str)
def test_the_counts_partition_the_visible_tokens(case: Case, impl: Impl) -> None:
    arguments = inputs(case)
    arguments["query"] = torch.zeros_like(arguments["query"])
    _, lse = attend(arguments, impl)
    _, count = dense_count(arguments)
    torch.testing.assert_close(lse.exp(), count[:, None].expand_as(lse), rtol=1e-12, atol=0)


def dense_count(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """How many tokens each token sees, as (batch, tokens, tokens) and summed."""
    batch, _, tokens, _ = arguments["query"].shape
    seen = torch.ones(batch, tokens, tokens, dtype=torch.bool)
    if arguments["is_causal"]:
        seen = seen.tril()
    if "padding_mask" in arguments:
        real = ~arguments["padding_mask"]
        seen = seen & real[:, :, None] & real[:, None, :]
    if "segment_ids" in arguments:
        seen = seen & (arguments["segment_ids"][:, :, None] == arguments["segment_ids"][:, None, :])
    return seen, seen.sum(-1).double()


def _constant_in_regions(x: Tensor, size: int) -> Tensor:
    return x[:, :, torch.arange(x.shape[2]) // size * size]


@pytest.mark.parametrize("window", [1, 3, 11])
@pytest.mark.parametrize("region_size", [4, 5])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_constant_regions_are_exact(impl: Impl, region_size: int, window: int) -> None:
    levels = replace(BASE, ratio=LevelRatio(0, 1, 1), region_size=region_size, window=window, union=True)
    arguments = inputs(Case(name="constant", levels=levels, heads=3, kv_heads=3))
    for name in ("key", "value"):
        arguments[name] = _constant_in_regions(arguments[name], region_size)
    for found, wanted in zip(attend(arguments, impl), dense(arguments), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_need_be_constant_only_in_regions_that_the_window_cuts(impl: Impl) -> None:
    levels = replace(BASE, ratio=REGIONAL, region_size=5, window=3)
    arguments = inputs(Case(name="cut", levels=levels, extras=False))
    arguments["key"] = _constant_in_regions(arguments["key"], 5)
    arguments["value"][:, :, :5] = arguments["value"][:, :, :1].clone()
    inside = slice(0, 4)
    out, lse = attend(arguments, impl)
    wanted_out, wanted_lse = dense(arguments)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[:, :, inside], wanted_out[:, :, inside], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out, wanted_out)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_constant_keys_and_values_make_the_remainder_exact(impl: Impl, is_causal: bool) -> None:
    arguments = inputs(Case(name="constant", is_causal=is_causal, padding="scattered"))
    for name in ("key", "value"):
        arguments[name] = arguments[name][:, :, :1].expand_as(arguments[name])
    for found, wanted in zip(attend(arguments, impl), dense(arguments), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_window_1_sees_itself_and_the_mean_of_all_others(impl: Impl) -> None:
    levels = Levels(ratio=LOCAL, window=1, region_size=4)
    arguments = inputs(Case(name="window_1", levels=levels, batch=1, heads=1, kv_heads=1, tokens=7, extras=False))
    q, k, v = (arguments[name][0, 0] for name in ("query", "key", "value"))
    out, _ = attend(arguments, impl)
    for i in range(7):
        others = [j for j in range(7) if j != i]
        keys = torch.stack([k[i], k[others].mean(0)])
        weights = torch.softmax(5**-0.5 * keys @ q[i] + torch.tensor([1.0, 6.0], dtype=q.dtype).log(), 0)
        wanted = weights @ torch.stack([v[i], v[others].mean(0)])
        torch.testing.assert_close(out[0, 0, i], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_empty_remainder_is_no_entry(impl: Impl) -> None:
    # the first query of a causal head has nothing outside its window, the last one has
    levels = Levels(ratio=LOCAL, window=5, region_size=4)
    arguments = inputs(Case(name="empty", levels=levels, heads=1, kv_heads=1, tokens=7, is_causal=True))
    out, _ = attend(arguments, impl)
    wanted, _ = dense(arguments)
    torch.testing.assert_close(out[:, :, :3], wanted[:, :, :3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[:, :, 0], arguments["value"][:, :, 0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out[:, :, 3:], wanted[:, :, 3:])


def test_oracle_splits_twelve_heads_as_the_design_says() -> None:
    assert split_heads((6, 3, 1), 12, 12) == (7, 4, 1)
