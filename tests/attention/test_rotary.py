"""Rotary positions inside attention: the tables, and kernels that rotate while they read against rotating first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import BASE, Case, inputs
from trilevel.attention import layer as layer_module
from trilevel.attention import library
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.attention.rope import rotary, rotary_tables, rotate
from trilevel.errors import ShapeError

needs_native = pytest.mark.skipif(not library.is_available(), reason=library.status().reason)
LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=7, num_global_tokens=3)


def test_each_pair_is_turned_by_its_angle() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    position, feature, theta = 4, 1, 100.0
    angle = torch.tensor(position * theta ** (-2 * feature / 8), dtype=torch.float64)
    turned = rotary(x, torch.arange(5)[None], theta=theta)[:, :, position]
    left, right = x[:, :, position, feature], x[:, :, position, feature + 4]
    torch.testing.assert_close(turned[..., feature], left * angle.cos() - right * angle.sin())
    torch.testing.assert_close(turned[..., feature + 4], right * angle.cos() + left * angle.sin())


def test_tables_rotate_as_positions_do() -> None:
    x, positions = torch.randn(2, 3, 7, 6), torch.randint(0, 50, (2, 7))
    assert rotate(x, *rotary_tables(positions, 6)).equal(rotary(x, positions))


@pytest.mark.parametrize("impl", ["reference", "blocked", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("dim", [6, 16, 64])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotating_inside_is_rotating_first(impl: Any, is_causal: bool, dim: int, rows: int) -> None:
    case = Case(name="rotary", tokens=67, dim=dim, heads=6, padding="scattered", is_causal=is_causal, levels=LEVELS)
    given = inputs(case, torch.float32)
    tables = rotary_tables(torch.randint(0, 999, (rows, 67)), dim)
    found = multi_level_attention(**given, rotary=tables, impl=impl)
    first = {**given, **{name: rotate(given[name], *tables) for name in ("query", "key")}}
    torch.testing.assert_close(found, multi_level_attention(**first, impl=impl), rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("mode", ["calibrated", "strict"])
def test_bfloat16_errs_no_more_than_rotating_first(mode: Any) -> None:
    case = Case(name="low", tokens=131, dim=32, levels=replace(LEVELS, mode=mode), without=("global_prior",))
    given = inputs(case, torch.bfloat16)
    tables = rotary_tables(torch.arange(131)[None], 32)
    high: dict[str, Any] = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()
    }
    true = multi_level_attention(**high, rotary=tables, impl="reference")
    found = multi_level_attention(**given, rotary=tables, impl="native")
    eager = multi_level_attention(**given, rotary=tables, impl="reference")
    assert (found - true).abs().max() <= 2 * (eager - true).abs().max()


@needs_native
def test_gradients_flow_through_the_rotation() -> None:
    given = inputs(Case(name="grad", dim=8, heads=6), torch.float32)
    tables = rotary_tables(torch.arange(19)[None], 8)
    slopes = []
    impls: tuple[Impl, ...] = ("native", "reference")
    for impl in impls:
        query = given["query"].clone().requires_grad_()
        out = multi_level_attention(**{**given, "query": query}, rotary=tables, impl=impl)
        slopes.append(torch.autograd.grad(out.square().sum(), query)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("positions", [None, torch.arange(5, 48)[None]], ids=["from_0", "given"])
def test_a_layer_without_gradients_reads_its_projection_in_place(
    positions: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MultiLevelAttention(48, 6, num_kv_heads=3, levels=LEVELS, rope_theta=100.0)
    x = torch.randn(2, 43, 48)
    wanted = layer(x, positions=positions).detach()
    seen: list[dict[str, Any]] = []
    whole = multi_level_attention

    def spy(*args: Any, **given: Any) -> Any:
        seen.append({"shares": len({y.untyped_storage().data_ptr() for y in args}) == 1, **given})
        return whole(*args, **given)

    monkeypatch.setattr(layer_module, "multi_level_attention", spy)
    with torch.no_grad():
        found = layer(x, positions=positions)
    assert seen[0]["shares"]
    assert seen[0]["rotary"] is not None
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cos", "sin"),
    [((1, 19, 5), (1, 19, 5)), ((3, 19, 4), (3, 19, 4)), ((1, 18, 4), (1, 18, 4)), ((1, 19, 4), (2, 19, 4))],
)
def test_tables_of_another_shape(cos: tuple[int, ...], sin: tuple[int, ...]) -> None:
    given = inputs(Case(name="shape", dim=8, levels=BASE), torch.float32)
    with pytest.raises(ShapeError, match="rotary"):
        multi_level_attention(**given, rotary=(torch.zeros(cos), torch.zeros(sin)))
