"""`triton` compiled, on a GPU: the calls of the other implementations, then sizes that it is made for."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.attention.cases import CASES, Case, clone, gradients, inputs
from tests.attention.triton_cases import LARGE, assert_float32, assert_low_precision, on
from trilevel.attention import api
from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

# what deterministic algorithms ask of cuBLAS, before CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; test_triton.py interprets the kernels"),
]

LEVELS = Levels(ratio=LevelRatio(2, 1, 1), window=33, region_size=64, num_global_tokens=64)
KINDS: dict[str, dict[str, Any]] = {
    "both_ways": {"levels": LEVELS},
    "causal": {"levels": LEVELS, "is_causal": True},
    "union": {"levels": replace(LEVELS, union=True, num_sinks=3)},
    "union_causal": {"levels": replace(LEVELS, union=True, num_sinks=3), "is_causal": True},
    "num_regions": {"levels": replace(LEVELS, region_size=None, num_regions=128)},
    "gate_wide": {"levels": replace(LEVELS, selection_gradient="gate", window=257)},
    "strict": {"levels": replace(LEVELS, mode="strict")},
}
SIZES: dict[str, Any] = {"batch": 2, "heads": 8, "kv_heads": 4}


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_float32(case: Case) -> None:
    assert_float32(case, "cuda")


@pytest.mark.parametrize("padding", [None, "scattered"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_of_long_inputs(kind: str, padding: str | None) -> None:
    assert_float32(Case(name=kind, tokens=1_531, dim=64, padding=padding, **SIZES, **KINDS[kind]), "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_float32_of_packed_inputs(kind: str) -> None:
    rows = ((311, 1, 640), (977, 0, 2, 51))
    assert_float32(Case(name=kind, tokens=1_531, dim=64, segments=rows, **SIZES, **KINDS[kind]), "cuda")


@pytest.mark.parametrize("dim", [16, 40, 80, 128, 256])
@pytest.mark.parametrize("kind", ["both_ways", "union_causal"])
def test_head_sizes(kind: str, dim: int) -> None:
    case = Case(name=kind, tokens=523, dim=dim, without=("global_prior",), **SIZES, **KINDS[kind])
    assert_float32(case, "cuda")
    assert_low_precision(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_errs_no_more_than_twice_the_reference(
    kind: str, padding: str | None, dtype: torch.dtype
) -> None:
    case = Case(name=kind, tokens=2_053, dim=64, padding=padding, without=("global_prior",), **SIZES, **KINDS[kind])
    assert_low_precision(case, dtype, "cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_compile_nothing_new_and_repeat_bit_for_bit(kind: str) -> None:
    from trilevel.attention.impl import triton_kernels

    def results(tokens: int) -> list[torch.Tensor]:
        case = Case(name=kind, tokens=tokens, dim=64, **SIZES, **KINDS[kind])
        leaves = clone(on("cuda", inputs(case, torch.bfloat16)), requires_grad=True)
        out = multi_level_attention(**leaves, impl="triton")
        out.float().square().sum().backward()
        return [out.detach(), *gradients(leaves).values()]

    def compiled() -> int:
        return sum(len(kernels[0]) for kernels in triton_kernels.forward.device_caches.values())

    first = results(1_021)
    known = compiled()
    assert all(one.equal(other) for one, other in zip(first, results(1_021), strict=True))
    results(769)
    results(2_053)
    assert compiled() == known


def test_a_sequence_of_131_072_tokens() -> None:
    levels = replace(LEVELS, region_size=1_024)
    case = Case(name="long", batch=1, heads=8, kv_heads=8, tokens=131_072, dim=64, levels=levels, extras=False)
    arguments = on("cuda", inputs(case, torch.bfloat16))
    found = multi_level_attention(**arguments, impl="triton").float()
    wanted = multi_level_attention(**{**arguments, **_as_float32(arguments)}, impl="blocked")
    assert (found - wanted).abs().max() <= 2e-2


def _as_float32(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name].float() for name in ("query", "key", "value")}


def test_auto_takes_it() -> None:
    arguments = on("cuda", inputs(Case(name="auto", tokens=101, dim=16), torch.float32))
    call = api.validated(
        arguments["query"], arguments["key"], arguments["value"], LEVELS, None, None, None, None, None, None, None,
        None, False, None, False,
    )  # fmt: skip
    assert api._cheapest(call) == "triton"
    assert multi_level_attention(**arguments).equal(multi_level_attention(**arguments, impl="triton"))
    in_float64 = on("cuda", inputs(Case(name="auto", tokens=101, dim=16)))
    assert multi_level_attention(**in_float64).dtype == torch.float64
