"""Gradients against finite differences in float64, and the straight-through one against its formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import BASE, IMPLEMENTATIONS, STRICT, Case, clone, inputs
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

SMALL: dict[str, Any] = {"batch": 1, "tokens": 7, "dim": 2}
LOCAL, REGIONAL, GLOBAL = LevelRatio(1, 0, 0), LevelRatio(0, 1, 0), LevelRatio(0, 0, 1)
ONE_HEAD: dict[str, Any] = {"heads": 1, "kv_heads": 1, **SMALL}


def _small(**changes: Any) -> Levels:
    return replace(BASE, region_size=3, num_global_tokens=2, **changes)


def _cases() -> list[Case]:
    cases = []
    for causal in (False, True):
        way = "causal" if causal else "both_ways"
        for name, levels in {
            "local": _small(ratio=LOCAL),
            "sinks": _small(ratio=LOCAL, num_sinks=2),
            "regional": _small(ratio=REGIONAL),
            "global": _small(ratio=GLOBAL),
            "global_gate": _small(ratio=GLOBAL, selection_gradient="gate"),
            "union_gate": _small(ratio=GLOBAL, union=True, selection_gradient="gate"),
        }.items():
            cases.append(Case(name=f"{name}-{way}", levels=levels, is_causal=causal, **ONE_HEAD))
        cases.append(Case(name=f"padding-{way}", levels=_small(), is_causal=causal, padding="scattered", **SMALL))
        cases.append(
            Case(name=f"segments-{way}", levels=_small(), is_causal=causal, segments=((3,),), heads=6, **SMALL)
        )
    for name, ratio in (("local", LOCAL), ("regional", REGIONAL), ("global", GLOBAL)):
        cases.append(Case(name=f"strict_{name}", levels=replace(STRICT, ratio=ratio, region_size=3), **ONE_HEAD))
    gate = replace(STRICT, ratio=GLOBAL, selection_gradient="gate")
    cases.append(Case(name="strict_gate", levels=gate, **ONE_HEAD))
    cases.append(Case(name="strict_segments", levels=STRICT, padding="left", segments=((3,),), **SMALL))
    return cases


@pytest.mark.parametrize("case", _cases(), ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradcheck(impl: Impl, case: Case) -> None:
    arguments = inputs(case)
    learned = ["query", "key", "value", "pool_weight", "region_gate"]
    if case.levels.selection_gradient == "gate":
        # far apart, so that a finite difference does not change the selection
        arguments["global_score"] = torch.randperm(case.tokens).double()[None] / 4 - arguments["global_prior"]
        learned += ["global_score", "global_prior"]
    learned = [name for name in learned if name in arguments]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = {**arguments, **dict(zip(learned, tensors, strict=True))}
        out, lse = multi_level_attention(**given, impl=impl, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    leaves = tuple(arguments[name].clone().requires_grad_() for name in learned)
    assert torch.autograd.gradcheck(function, leaves, fast_mode=case.heads > 1)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_straight_through_gradient_is_that_of_the_gate_at_the_exact_forward(impl: Impl, is_causal: bool) -> None:
    chosen = torch.tensor([2, 7])
    levels = Levels(ratio=GLOBAL, window=3, region_size=4, num_global_tokens=2, selection_chunk=1)
    case = Case(name="formula", levels=levels, is_causal=is_causal, heads=2, kv_heads=1, tokens=11, extras=False)
    arguments = clone(inputs(case))
    score = torch.randn(2, 11, dtype=torch.float64)
    # selected by force, so that the scores are free
    forced = torch.zeros(2, 11, dtype=torch.bool)
    forced[:, chosen] = True
    score.requires_grad_()
    arguments |= {"global_score": score, "global_forced": forced}
    out, lse = multi_level_attention(**arguments, impl=impl, return_lse=True)
    upstream = torch.randn_like(out)
    out.backward(upstream)

    # d out_i / d c_j = p_ij (v_j - out_i), and d c_j / d score_j = 1 - sigmoid(score_j) = sigmoid(-score_j)
    wanted = torch.zeros_like(score)
    with torch.no_grad():
        for j in chosen.tolist():
            key, value = arguments["key"][:, :, j : j + 1], arguments["value"][:, :, j : j + 1]
            weight = (5**-0.5 * (arguments["query"] * key).sum(-1) - lse).exp()
            at = torch.arange(11)
            tail = (at > j + 1) if is_causal else (at - j).abs() > 1
            effect = ((value - out) * upstream).sum(-1) * weight * tail
            wanted[:, j] = effect.sum((1, 2)) * torch.sigmoid(-score[:, j])
    assert wanted.count_nonzero() == 4
    assert score.grad is not None
    # causal queries before token 7 have a place left for others
    torch.testing.assert_close(score.grad[:, chosen], wanted[:, chosen], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", ["straight_through", "gate"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_only_selected_tokens_teach_the_scorer(impl: Impl, gradient: Any) -> None:
    levels = replace(BASE, ratio=GLOBAL, selection_gradient=gradient)
    case = Case(name="which", levels=levels, without=("global_forced", "global_prior"))
    arguments = inputs(case)
    arguments["global_score"] = torch.stack([torch.randperm(19), torch.randperm(19)]).double().requires_grad_()
    out = multi_level_attention(**arguments, impl=impl)
    out.square().sum().backward()
    taught = arguments["global_score"].grad != 0
    assert taught.equal(arguments["global_score"] > 15)


def test_straight_through_forward_is_the_one_without_scores_gradient() -> None:
    arguments = inputs(Case(name="forward", without=("global_forced",)))
    gated = {**arguments, "levels": replace(BASE, selection_gradient="gate")}
    for impl in IMPLEMENTATIONS:
        out = multi_level_attention(**arguments, impl=impl)
        learned = {**arguments, "global_score": arguments["global_score"].clone().requires_grad_()}
        assert multi_level_attention(**learned, impl=impl).equal(out)
        assert not torch.allclose(multi_level_attention(**gated, impl=impl), out)
