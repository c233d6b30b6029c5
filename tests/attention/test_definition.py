"""Both implementations against the oracle, which was written token by token from the definition."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attention.cases import CASES, IMPLEMENTATIONS, Case, clone, gradients, inputs
from tests.attention.oracle import oracle
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

# float64 sums of at most some tens of numbers in another order
TOLERANCE = 1e-12


@cache
def expected(case: Case) -> tuple[Tensor, Tensor]:
    return oracle(**inputs(case))


def attend(arguments: dict[str, Any], impl: Impl) -> tuple[Tensor, Tensor]:
    return multi_level_attention(**arguments, impl=impl, return_lse=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case, impl: Impl) -> None:
    out, lse = attend(inputs(case), impl)
    wanted_out, wanted_lse = expected(case)
    torch.testing.assert_close(lse, wanted_lse, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(out, wanted_out, rtol=TOLERANCE, atol=TOLERANCE)


_GRADIENT_CASES = [
    case
    for case in CASES
    if case.name.removesuffix("-causal").removesuffix("-both_ways")
    in {"base", "union_gate", "segments_padding", "sinks", "num_regions_segments", "strict", "strict_segments_padding"}
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", _GRADIENT_CASES, ids=str)
def test_gradients_equal_those_of_the_oracle(case: Case, impl: Impl) -> None:
    ours, theirs = (clone(inputs(case), requires_grad=True) for _ in range(2))
    for arguments, (out, lse) in ((theirs, oracle(**theirs)), (ours, attend(ours, impl))):
        weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        loss = (out * weight).sum() + lse[lse.isfinite()].square().sum()
        assert arguments["query"].grad is None
        loss.backward()
    wanted = gradients(theirs)
    for name, found in gradients(ours).items():
        assert torch.allclose(found, wanted[name], rtol=1e-10, atol=1e-10), name


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    """Any combination of options, the ones nobody thought of included."""
    strict = draw(st.booleans())
    causal = not strict and draw(st.booleans())
    kv_heads = draw(st.sampled_from([3, 5]))
    tokens = draw(st.integers(1, 17))
    by_size = causal or draw(st.booleans())
    size = draw(st.integers(1, 9))
    levels = Levels(
        ratio=draw(st.sampled_from([LevelRatio(1, 1, 1), LevelRatio(0, 1, 2), LevelRatio(3, 0, 1)])),
        mode="strict" if strict else "calibrated",
        window=2 * draw(st.integers(0, 5)) + 1,
        region_size=size if by_size else None,
        num_regions=None if by_size else size,
        num_global_tokens=draw(st.integers(1, 9)),
        num_sinks=0 if strict else draw(st.integers(0, 3)),
        union=not strict and draw(st.booleans()),
        selection_gradient=draw(st.sampled_from(["straight_through", "gate"])),
        selection_chunk=draw(st.none() | st.integers(1, 7)) if causal else None,
    )
    lengths = st.lists(st.integers(0, 7), max_size=4).map(tuple)
    return Case(
        name="any",
        levels=levels,
        batch=2,
        heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        tokens=tokens,
        dim=3,
        is_causal=causal,
        padding=draw(st.sampled_from([None, "right", "left", "middle", "scattered", "whole_row"])),
        segments=draw(st.none() | st.tuples(lengths, lengths)),
        extras=draw(st.booleans()),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=any_case())
def test_any_combination_equals_the_oracle(case: Case, impl: Impl) -> None:
    arguments = inputs(case)
    for found, wanted in zip(attend(arguments, impl), oracle(**arguments), strict=True):
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
