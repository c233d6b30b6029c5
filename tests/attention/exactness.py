"""How far an implementation in low precision is from the truth, in units of what low precision explains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.attention.cases import clone, gradients
from trilevel.attention.api import Impl, multi_level_attention

# how much worse than the reference in the same type: sums in another order, and exponentials of about 1 ulp
FACTOR = {torch.float32: 4, torch.bfloat16: 2}
# roundings of the largest number on top, because a small reference may err by none and gradients are differences
ROUNDINGS = {torch.float32: 4, torch.bfloat16: 1}


def round_scores(arguments: dict[str, Any]) -> dict[str, Any]:
    """Scores in quarters: their sums with priors are exact in every type, so that all choose the same tokens."""
    score = arguments.get("global_score")
    return arguments if score is None else {**arguments, "global_score": (score * 4).round() / 4}


def results(arguments: dict[str, Any], impl: Impl) -> dict[str, Tensor]:
    """Output, log-sum-exp, and the gradients of a loss on both by the name of their argument."""
    leaves = clone(arguments, requires_grad=True)
    out, lse = multi_level_attention(**leaves, impl=impl, return_lse=True)
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    of_lse = torch.linspace(2, -1, lse.numel(), dtype=torch.float64).view_as(lse).to(lse.dtype)
    seen = lse.isfinite()
    ((out * slope).sum() + (lse * of_lse)[seen].sum()).backward()
    return {"out": out.detach(), "lse": lse.detach(), **gradients(leaves)}


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def assert_exact(arguments: dict[str, Any], impl: Impl = "native") -> None:
    """All results err at most `FACTOR` times as much as the reference in the same type, and `ROUNDINGS`."""
    found, eager = results(arguments, impl), results(arguments, "reference")
    true, dtype = results(in_float64(arguments), "reference"), arguments["query"].dtype
    told, largest = [], true["lse"][true["lse"].isfinite()].abs()
    # the backward pass takes probabilities from the rounded log-sum-exp: one of x is wrong by a factor of eps * x
    steps = ROUNDINGS[dtype] * (1 + (float(largest.max()) if dtype == torch.float32 and largest.numel() else 0))
    for name, wanted in true.items():
        finite = wanted.isfinite()
        assert found[name].dtype == eager[name].dtype, name
        assert finite.equal(found[name].isfinite()), f"{name} is finite elsewhere"
        if not finite.any():
            continue
        wanted = wanted[finite]
        error, of_eager = ((x[name].double()[finite] - wanted).abs().max() for x in (found, eager))
        allowed = FACTOR[dtype] * of_eager + steps * torch.finfo(dtype).eps * wanted.abs().max()
        if error > allowed:
            told.append(f"{name} errs by {error:.2e}, the reference by {of_eager:.2e}, allowed are {allowed:.2e}")
    assert not told, "; ".join(told)
