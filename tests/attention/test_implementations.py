"""`blocked` against `reference`: outputs and gradients where block borders, strides and low precision may go wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import Case, clone, gradients, inputs
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

W, S = 16, 64
LENGTHS = [1, 2, W, W + 1, S - 1, S, S + 1, 101, 131, 257]
LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=2 * W + 1, region_size=S, num_global_tokens=13)
KINDS: dict[str, dict[str, Any]] = {
    "both_ways": {"levels": LEVELS},
    "causal": {"levels": LEVELS, "is_causal": True},
    "sinks_union": {"levels": replace(LEVELS, num_sinks=3, union=True, window=5, region_size=7)},
    "sinks_union_causal": {"levels": replace(LEVELS, num_sinks=3, union=True, region_size=7), "is_causal": True},
    "num_regions": {"levels": replace(LEVELS, region_size=None, num_regions=11)},
    "gate_wide": {"levels": replace(LEVELS, selection_gradient="gate", window=131)},
    "strict": {"levels": replace(LEVELS, mode="strict", region_size=7)},
}


def run(arguments: dict[str, Any], impl: Impl) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = clone(arguments, requires_grad=True)
    out, lse = multi_level_attention(**leaves, impl=impl, return_lse=True)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    ((out * weight).sum() + lse[lse.isfinite()].sum()).backward()
    return out.detach(), lse.detach(), gradients(leaves)


def assert_same(arguments: dict[str, Any], tolerance: float) -> None:
    out, lse, gradient = run(arguments, "blocked")
    wanted_out, wanted_lse, wanted_gradient = run(arguments, "reference")
    assert out.dtype == wanted_out.dtype
    assert lse.dtype == wanted_lse.dtype
    torch.testing.assert_close(out, wanted_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, wanted_lse, rtol=tolerance, atol=tolerance)
    for name, found in gradient.items():
        bound = tolerance * max(1.0, float(wanted_gradient[name].abs().max()))
        assert (found - wanted_gradient[name]).abs().max() <= bound, name


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_lengths(kind: str, tokens: int) -> None:
    assert_same(inputs(Case(name=kind, tokens=tokens, **KINDS[kind])), 1e-11)


@pytest.mark.parametrize("padding", ["left", "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind: str, padding: str) -> None:
    assert_same(inputs(Case(name=kind, tokens=131, padding=padding, **KINDS[kind])), 1e-11)


@pytest.mark.parametrize("padding", [None, "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_segments(kind: str, padding: str | None) -> None:
    rows = ((31, 1, 64), (97, 0, 2, 5))
    assert_same(inputs(Case(name=kind, tokens=131, segments=rows, padding=padding, **KINDS[kind])), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_heads(kind: str) -> None:
    assert_same(inputs(Case(name=kind, tokens=101, heads=10, kv_heads=5, **KINDS[kind])), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    assert_same(inputs(Case(name=kind, tokens=131, dim=7, padding="right", **KINDS[kind]), torch.float32), 3e-5)


def _spread(x: Tensor) -> Tensor:
    """The same values at other strides: the last two axes swapped in memory, every second element used."""
    wide = torch.zeros(*x.shape[:-2], x.shape[-1], 2 * x.shape[-2], dtype=x.dtype)
    view = wide[..., ::2].transpose(-1, -2)
    view.copy_(x)
    return view


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: str) -> None:
    arguments = inputs(Case(name=kind, tokens=101, **KINDS[kind]))
    spread = {**arguments, **{name: _spread(arguments[name]) for name in ("query", "key", "value")}}
    spread["global_score"] = arguments["global_score"].t().contiguous().t()
    assert not spread["query"].is_contiguous()
    wanted = multi_level_attention(**arguments, impl="blocked", return_lse=True)
    for found, contiguous in zip(multi_level_attention(**spread, impl="blocked", return_lse=True), wanted, strict=True):
        torch.testing.assert_close(found, contiguous, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone(kind: str) -> None:
    arguments = inputs(Case(name=kind, tokens=37, padding="right", **KINDS[kind]))
    before = clone(arguments)
    multi_level_attention(**arguments, impl="blocked")
    for name, value in before.items():
        assert not isinstance(value, Tensor) or value.equal(arguments[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_errs_no_more_than_twice_the_reference(
    kind: str, padding: str | None, dtype: torch.dtype
) -> None:
    # sums of scores are rounded before tokens are selected: one addend keeps the selection the same
    case = Case(name=kind, tokens=131, dim=8, padding=padding, without=("global_prior",), **KINDS[kind])
    low = inputs(case, dtype)
    high = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in low.items()
    }
    out, lse, gradient = run(low, "blocked")
    eager_out, eager_lse, eager_gradient = run(low, "reference")
    true_out, true_lse, true_gradient = run(high, "reference")
    assert out.dtype == dtype
    assert lse.dtype == eager_lse.dtype == torch.float32
    finite = true_lse.isfinite()
    assert finite.equal(lse.isfinite())
    compared = {
        "out": (out, eager_out, true_out),
        "lse": (lse[finite], eager_lse[finite], true_lse[finite]),
        **{name: (gradient[name], eager_gradient[name], true_gradient[name]) for name in gradient},
    }
    for name, (found, eager, true) in compared.items():
        allowed = 2 * (eager.double() - true).abs().max() + torch.finfo(dtype).eps * true.abs().max()
        assert (found.double() - true).abs().max() <= allowed, name


def test_reference_and_blocked_name_the_same_function_under_no_grad() -> None:
    arguments = inputs(Case(name="no_grad", tokens=101, levels=LEVELS))
    with_grad = multi_level_attention(**arguments, impl="blocked")
    with torch.no_grad():
        assert multi_level_attention(**arguments, impl="blocked").equal(with_grad)
    with torch.inference_mode():
        assert multi_level_attention(**arguments, impl="blocked").equal(with_grad)
