"""What the Triton tests share: calls, and the comparison with `reference` in float64 on any device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.attention.cases import BASE, Case, inputs
from tests.attention.test_implementations import run
from trilevel.attention.levels import LevelRatio, Levels

FLOAT32 = 3e-5
WIDE = Levels(ratio=LevelRatio(1, 1, 1), window=41, region_size=3, num_global_tokens=19)
# tiles of 16 are crossed by queries, window, tail and regions; queries of a summary are split among programs
LARGE = [
    Case(name="large-both_ways", levels=replace(WIDE, union=True, num_sinks=2), batch=1, tokens=53),
    Case(name="large-causal", levels=replace(WIDE, window=19), batch=1, tokens=53, is_causal=True),
    Case(name="large-strict", levels=replace(WIDE, mode="strict"), batch=1, tokens=71, padding="right"),
    Case(
        name="large-packed",
        levels=replace(BASE, ratio=LevelRatio(0, 1, 1), num_global_tokens=17),
        batch=1,
        heads=4,
        kv_heads=2,
        tokens=61,
        segments=((29, 1, 23),),
        padding="scattered",
    ),
]


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their tensors on a device."""
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64."""
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def assert_float32(case: Case, device: str = "cpu") -> None:
    """Output, log-sum-exp and every gradient are those of the reference in float64, up to float32's rounding."""
    arguments = on(device, inputs(case, torch.float32))
    if "global_score" in arguments:
        # sums of score and prior are then exact in either precision, and select the same tokens
        arguments["global_score"] = (8 * arguments["global_score"]).round() / 8
    out, lse, gradient = run(arguments, "triton")
    true_out, true_lse, true_gradient = run(in_float64(arguments), "reference")
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), true_out, rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(lse.double(), true_lse, rtol=FLOAT32, atol=FLOAT32)
    for name, found in gradient.items():
        bound = FLOAT32 * max(1.0, float(true_gradient[name].abs().max()))
        assert (found - true_gradient[name]).abs().max() <= bound, name


def assert_low_precision(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Errors are at most twice those of the reference in the same precision, and one rounding step."""
    low = on(device, inputs(case, dtype))
    out, lse, gradient = run(low, "triton")
    eager_out, eager_lse, eager_gradient = run(low, "reference")
    true_out, true_lse, true_gradient = run(in_float64(low), "reference")
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
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
