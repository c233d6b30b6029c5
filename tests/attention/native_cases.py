"""Calls for the native kernels, and what the reference says of them; for tests in this process and in others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.attention.cases import CASES, inputs, padding_mask
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

DTYPES = (torch.float32, torch.bfloat16)
# lengths around tiles of 16 and blocks of 32, and none of them
_LENGTHS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 47, 61, 97, 131, 199)
_DIMS = (8, 16, 17, 32, 48, 64, 96)
_RATIOS = (LevelRatio(1, 0, 0), LevelRatio(0, 1, 0), LevelRatio(0, 0, 1), LevelRatio(6, 3, 1))


@dataclass(frozen=True, slots=True)
class Problem:
    """Arguments of `multi_level_attention`, and the gradients that arrive at its results."""

    name: str
    arguments: dict[str, Any]
    grad_out: Tensor
    grad_lse: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The type of query, key and value."""
        dtype: torch.dtype = self.arguments["query"].dtype
        return dtype


def named(dtype: torch.dtype) -> Iterator[Problem]:
    """The cases of every implementation; without priors: sums of scores would be rounded before tokens are chosen."""
    for case in CASES:
        yield _problem(f"{case} {dtype}", inputs(replace(case, without=(*case.without, "global_prior")), dtype))


def drawn(count: int, seed: int) -> Iterator[Problem]:
    """Random calls: lengths, head sizes, memory layouts, levels and masks; the same ones for the same seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for index in range(count):
        arguments = draw_arguments(draw)
        told = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in arguments.items() if x is not None}
        yield _problem(f"drawn {seed}:{index} {told}", arguments)


def draw_arguments(draw: random.Random) -> dict[str, Any]:
    """Arguments of one random call."""
    batch, tokens, dim, heads = 2, draw.choice(_LENGTHS), draw.choice(_DIMS), 8
    kv_heads, dtype = draw.choice((8, 4)), draw.choice((torch.float32, *DTYPES))
    is_causal = draw.random() < 0.5
    layout = draw.choice(("plain", "tokens_first", "fused"))
    query, key, value = (cast(x, dtype) for x in rows(layout, batch, heads, kv_heads, tokens, dim))
    padding = draw.choice((None, None, "right", "left", "middle", "scattered", "whole_row"))
    forced = torch.zeros(batch, tokens, dtype=torch.bool)
    forced[:, tokens // 2] = True
    segments = torch.randint(0, 2, (batch, tokens)).cumsum(1) // max(1, tokens // 5)
    return {
        "query": query,
        "key": key,
        "value": value,
        "levels": _draw_levels(draw, is_causal),
        "pool_weight": torch.randn(kv_heads, dim).to(dtype) if draw.random() < 0.7 else None,
        "global_score": torch.randn(batch, tokens).to(dtype) if draw.random() < 0.7 else None,
        "global_forced": forced if draw.random() < 0.3 else None,
        "padding_mask": None if padding is None else padding_mask(padding, batch, tokens),
        "segment_ids": segments if draw.random() < 0.4 else None,
        "is_causal": is_causal,
        "scale": draw.choice((None, 0.31)),
    }


def _draw_levels(draw: random.Random, is_causal: bool) -> Levels:
    num_regions = None if is_causal or draw.random() < 0.5 else draw.choice((1, 2, 5, 11))
    return Levels(
        ratio=draw.choice(_RATIOS),
        window=draw.choice((1, 3, 5, 9, 33)),
        region_size=draw.choice((1, 2, 3, 5, 8, 16)) if num_regions is None else None,
        num_regions=num_regions,
        num_global_tokens=draw.choice((1, 3, 8, 50)),
        num_sinks=draw.choice((0, 0, 2)),
        union=draw.random() < 0.3,
        selection_gradient=draw.choice(("gate", "straight_through")),
        selection_chunk=draw.choice((None, 1, 4, 7)),
    )


def rows(layout: str, batch: int, heads: int, kv_heads: int, tokens: int, dim: int) -> list[Tensor]:
    """Query, key and value as views: `plain`, `tokens_first`, or `fused` in the rows of one projection."""
    counts = (heads, kv_heads, kv_heads)
    if layout == "plain":
        return [torch.randn(batch, count, tokens, dim) for count in counts]
    if layout == "tokens_first":
        return [torch.randn(batch, tokens, count, dim).transpose(1, 2) for count in counts]
    return [part.transpose(1, 2) for part in torch.randn(batch, tokens, sum(counts), dim).split(counts, dim=2)]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same strides in another type."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)


def _problem(name: str, arguments: dict[str, Any]) -> Problem:
    query = arguments["query"]
    # of the call's type, so that both sides get the same gradients
    return Problem(name, arguments, torch.randn(query.shape).to(query.dtype), torch.randn(query.shape[:3]))


def results(problem: Problem, impl: Impl, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients by the name of their argument; computed in `dtype`, None: as given."""
    arguments = dict(problem.arguments)
    leaves = {}
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            # a view keeps its strides
            leaves[name] = arguments[name] = (x.detach() if dtype is None else x.to(dtype)).requires_grad_()
    out, lse = multi_level_attention(**arguments, impl=impl, return_lse=True)
    seen = lse.isfinite()
    total = (out * problem.grad_out.to(out.dtype)).sum() + (lse * problem.grad_lse.to(lse.dtype))[seen].sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return {"out": out.detach(), "lse": lse.detach(), **found}


def differences(problem: Problem, found: dict[str, Tensor]) -> list[str]:
    """Where results are further from the exact ones than low precision explains: three errors of the reference."""
    exact, plain = results(problem, "reference", torch.float64), results(problem, "reference")
    # the reference's error may be zero by luck
    floor = 2e-5 if problem.dtype == torch.float32 else float(torch.finfo(torch.bfloat16).eps)
    told = []
    for name, value in found.items():
        finite = exact[name].isfinite()
        if not finite.equal(value.isfinite()):
            told.append(f"{name} is finite elsewhere")
            continue
        true, error = exact[name][finite], (value.double() - exact[name])[finite].abs()
        if not error.numel():
            continue
        allowed = 3 * (plain[name].double() - exact[name])[finite].abs().max() + floor * true.abs().max().clamp(min=1)
        if error.max() > allowed:
            told.append(f"{name} errs by {error.max():.2e}, allowed {allowed:.2e}")
    return told
