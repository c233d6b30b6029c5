"""`triton` in Triton's interpreter against `reference`, and what it says where it cannot run.

Where there is no GPU the kernels are interpreted (tests/conftest.py); with one, test_triton_gpu.py runs the same calls
compiled.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import BASE, CASES, STRICT, Case, clone, gradients, inputs
from tests.attention.test_implementations import _spread
from tests.attention.triton_cases import LARGE, assert_float32, assert_low_precision
from trilevel.attention import api
from trilevel.attention.api import multi_level_attention
from trilevel.attention.impl import triton
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ImplementationError, MissingExtraError

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is there: test_triton_gpu.py runs the kernels compiled"
)

NAMES = [
    "base-both_ways", "base-causal", "window_1-both_ways", "window_over_all-both_ways", "sinks-causal",
    "union-both_ways", "union-causal", "gate-both_ways", "local_only-both_ways", "regional_only-causal",
    "one_token-both_ways", "two_tokens-causal", "padding_left-both_ways", "padding_scattered-causal",
    "padding_whole_row-both_ways", "segments_union-both_ways", "segments_padding-causal", "num_regions_segments",
    "dense_below-causal", "strict", "strict_padding_scattered", "strict_segments_num", "strict_grouped",
]  # fmt: skip
CHOSEN = [case if case.padding or case.segments else replace(case, batch=1) for case in CASES if case.name in NAMES]


def test_chosen_cases_exist() -> None:
    assert len(CHOSEN) == len(NAMES)


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'trilevel[gpu]'")


@interpreted
def test_the_kernels_are_interpreted() -> None:
    from triton.language import cdiv
    from triton.runtime.interpreter import InterpretedFunction

    from trilevel.attention.impl.triton_kernels import INTERPRETED

    assert INTERPRETED
    assert isinstance(cdiv, InterpretedFunction), "triton was imported before tests/conftest.py set TRITON_INTERPRET"


@interpreted
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_float32(case: Case) -> None:
    assert_float32(case)


@interpreted
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_more_than_one_tile_of_everything(case: Case) -> None:
    assert_float32(case)


@interpreted
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in NAMES], ids=str)
def test_float32_of_every_other_case(case: Case) -> None:
    assert_float32(case)


UNION = Levels(ratio=LevelRatio(0, 0, 1), window=7, region_size=4, num_global_tokens=5, union=True)
LOW: dict[str, dict[str, Any]] = {
    "both_ways": {"padding": "right", "levels": BASE},
    "causal": {"is_causal": True, "levels": UNION, "heads": 2, "kv_heads": 1},
    "strict": {"levels": STRICT},
}


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LOW)
def test_low_precision_errs_no_more_than_twice_the_reference(kind: str, dtype: torch.dtype) -> None:
    # sums of scores are rounded before tokens are selected: one addend keeps the selection the same
    assert_low_precision(Case(name=kind, batch=1, dim=8, without=("global_prior",), **LOW[kind]), dtype)


@interpreted
def test_strides_do_not_matter() -> None:
    arguments = inputs(Case(name="strides", batch=1, tokens=23), torch.float32)
    spread = {**arguments, **{name: _spread(arguments[name]) for name in ("query", "key", "value")}}
    assert not spread["query"].is_contiguous()
    results = []
    for given in (arguments, spread):
        leaves = {name: x.requires_grad_() if name in ("query", "key", "value") else x for name, x in given.items()}
        out = multi_level_attention(**leaves, impl="triton")
        out.transpose(-1, -2).square().sum().backward()
        results.append([out, *(leaves[name].grad for name in ("query", "key", "value"))])
    for found, wanted in zip(*results, strict=True):
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@interpreted
def test_without_gradients_the_same_and_inputs_are_left_alone() -> None:
    arguments = inputs(Case(name="no_grad", batch=1, padding="right"), torch.float32)
    before = clone(arguments)
    with_grad = multi_level_attention(**clone(arguments, requires_grad=True), impl="triton")
    with torch.inference_mode():
        assert multi_level_attention(**arguments, impl="triton").equal(with_grad)
    for name, value in before.items():
        assert not isinstance(value, Tensor) or value.equal(arguments[name]), name


@interpreted
@pytest.mark.parametrize("part", [0, 1], ids=["output", "lse"])
def test_gradient_of_one_result_alone(part: int) -> None:
    case = Case(name="alone", batch=1, extras=False)
    found, wanted = (clone(inputs(case, dtype), requires_grad=True) for dtype in (torch.float32, torch.float64))
    multi_level_attention(**found, impl="triton", return_lse=True)[part].square().sum().backward()
    multi_level_attention(**wanted, impl="reference", return_lse=True)[part].square().sum().backward()
    for name, gradient in gradients(wanted).items():
        torch.testing.assert_close(gradients(found)[name].double(), gradient, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("hidden", ["padding", "future", "segment"])
def test_what_is_not_finite_and_hidden_never_leaks(hidden: str) -> None:
    case = Case(
        name=hidden,
        is_causal=hidden == "future",
        padding="right" if hidden == "padding" else None,
        segments=((7, 12),) if hidden == "segment" else None,
        batch=1,
        without=("global_forced",),
    )
    clean = inputs(case, torch.float32)
    where = {
        "padding": clean.get("padding_mask"),
        "future": (torch.arange(19) > 11)[None],
        "segment": None if hidden != "segment" else clean["segment_ids"] == 1,
    }[hidden]
    assert where is not None
    results = []
    for value in (0.0, torch.nan):
        arguments = clone(clean)
        for name in ("query", "key", "value"):
            arguments[name] = arguments[name].masked_fill(where[:, None, :, None], value)
        leaves = clone(arguments, requires_grad=True)
        out = multi_level_attention(**leaves, impl="triton")[(~where)[:, None].expand(1, 3, 19)]
        out.square().sum().backward()
        results.append((out.detach(), gradients(leaves)))
    assert results[0][0].isfinite().all()
    torch.testing.assert_close(results[1][0], results[0][0])
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(gradient, results[0][1][name])


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_visible_value_that_is_not_finite_shows(name: str) -> None:
    arguments = inputs(Case(name="bad", extras=False), torch.float32)
    arguments[name][0, :, 6] = torch.nan
    out = multi_level_attention(**arguments, impl="triton")
    assert not out[0, :, 6].isfinite().any()
    assert out[1].isfinite().all()


@interpreted
def test_there_is_no_second_derivative() -> None:
    arguments = clone(inputs(Case(name="twice", batch=1, tokens=5, extras=False), torch.float32), requires_grad=True)
    out = multi_level_attention(**arguments, impl="triton")
    (first,) = torch.autograd.grad(out.square().sum(), arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({}, torch.float64, r"float32, bfloat16 and float16, got torch.float64\. Cast, or use impl='blocked'"),
        ({"dim": 257}, torch.float32, r"up to 256 dims, got 257\. Use impl='blocked'"),
    ],
)
def test_what_it_cannot_do_is_said(changes: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    arguments = inputs(Case(name="message", tokens=3, extras=False, **changes), dtype)
    with pytest.raises(ImplementationError, match=message):
        multi_level_attention(**arguments, impl="triton")


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "forward_kernels", lambda: SimpleNamespace(INTERPRETED=False))
    with pytest.raises(ImplementationError, match=r"needs CUDA tensors, got cpu\. Move them.*TRITON_INTERPRET=1"):
        multi_level_attention(**inputs(Case(name="cpu", extras=False), torch.float32), impl="triton")


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    query = SimpleNamespace(dtype=torch.float32, shape=(1, 1, 5, 8), device=torch.device("cuda:0"))
    monkeypatch.setattr(triton, "forward_kernels", lambda: SimpleNamespace(INTERPRETED=False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    call: Any = SimpleNamespace(query=query)
    assert "compute capability 8.0, cuda:0 has 7.5" in str(triton.obstacle(call))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert triton.obstacle(call) is None


def test_an_absent_triton_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise MissingExtraError("'triton' is not installed: pip install 'trilevel[gpu]'.")

    monkeypatch.setattr(triton, "forward_kernels", absent)
    with pytest.raises(ImplementationError, match=r"pip install 'trilevel\[gpu\]'.*impl='blocked'"):
        multi_level_attention(**inputs(Case(name="absent", extras=False), torch.float32), impl="triton")


def test_auto_takes_it_for_cuda_tensors_it_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*, is_cuda: bool, missing: str | None) -> str:
        monkeypatch.setattr(triton, "obstacle", lambda _: missing)
        x = inputs(Case(name="auto", extras=False), torch.float32)["query"]
        query = SimpleNamespace(is_cuda=is_cuda, shape=x.shape, dtype=x.dtype, device=torch.device("cuda"))
        call: Any = SimpleNamespace(query=query, levels=BASE)
        return api._cheapest(call)

    assert chosen(is_cuda=True, missing=None) == "triton"
    assert chosen(is_cuda=True, missing="not installed") == "blocked"


def test_it_is_not_traced() -> None:
    arguments = inputs(Case(name="traced", extras=False), torch.float32)
    compiled = torch.compile(lambda: multi_level_attention(**arguments, impl="triton"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"not traced by torch\.compile"):
        compiled()


def test_importing_attention_imports_no_kernel() -> None:
    # triton itself may come with parts of torch
    code = "import sys, trilevel.attention.api; sys.exit('trilevel.attention.impl.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
