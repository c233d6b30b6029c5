"""How `native` is called: memory layouts, gradients, bad input, threads of Python and forked processes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import CASES, STRICT, Case, clone, gradients, inputs
from tests.attention.exactness import results, round_scores
from tests.attention.test_implementations import KINDS, _spread
from trilevel.attention import library
from trilevel.attention.api import multi_level_attention
from trilevel.attention.impl import native
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.attention.native import build
from trilevel.errors import ConfigError, ImplementationError, ShapeError

pytestmark = pytest.mark.skipif(not library.is_available(), reason=f"no native library: {build.AGAIN}")

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=9, region_size=8, num_global_tokens=5, num_sinks=2)
LOCAL = replace(LEVELS, ratio=LevelRatio(1, 0, 0))


def attend(*rows: Tensor, levels: Levels = LEVELS, **options: Any) -> Tensor:
    out: Tensor = multi_level_attention(*rows, levels=levels, impl="native", **options)
    return out


def fused(
    batch: int = 2, tokens: int = 67, heads: int = 3, dim: int = 16, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What a projection to queries, keys and values gives."""
    return torch.randn(batch, tokens, 3 * heads * dim).to(dtype)


def split(projected: Tensor, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = projected.unflatten(-1, (3, 3, dim)).permute(2, 0, 3, 1, 4).unbind()
    return query, key, value


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_projection_is_read_where_it_lies(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = split(fused(dtype=dtype))
    assert not query.is_contiguous()
    read: list[int] = []
    rows = native._rows

    def spy(x: Tensor) -> Tensor:
        given = rows(x)
        assert given is x
        read.append(given.data_ptr())
        return given

    monkeypatch.setattr(native, "_rows", spy)
    out = attend(query, key, value)
    assert read == [x.data_ptr() for x in (query, key, value)]
    assert out.equal(attend(query.contiguous(), key.contiguous(), value.contiguous()))
    # what the output projection reads lies side by side
    assert out.transpose(1, 2).is_contiguous()


def test_the_output_is_all_the_memory_that_torch_gives() -> None:
    query, key, value = split(fused(batch=1, tokens=4_096, dim=64), dim=64)
    attend(query, key, value)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        out = attend(query, key, value)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert out.nbytes <= taken < 1.05 * out.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind: str) -> None:
    arguments = round_scores(inputs(Case(name=kind, tokens=101, dim=8, **KINDS[kind]), torch.float32))
    spread = {**arguments, **{name: _spread(arguments[name]) for name in ("query", "key", "value")}}
    spread["global_score"] = arguments["global_score"].t().contiguous().t()
    assert spread["query"].stride(-1) != 1
    for (name, found), wanted in zip(
        results(spread, "native").items(), results(arguments, "native").values(), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=name)


def _overlapping(x: Tensor) -> Tensor:
    """Rows that start 4 numbers after each other and share the rest."""
    return x.flatten()[: 4 * x.shape[2] + x.shape[3]].as_strided(x.shape, (0, 0, 4, 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one_row_for_all": lambda x: x[:1].expand_as(x),
    "one_head_for_all": lambda x: x[:, :1].expand_as(x),
    "one_token_for_all": lambda x: x[:, :, :1].expand_as(x),
    "one_feature_for_all": lambda x: x[..., :1].expand_as(x),
    "one_number_for_all": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "overlapping_rows": _overlapping,
    "every_second_row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "heads_last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "odd_address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_may_be_shared_or_scattered(layout: str, dtype: torch.dtype) -> None:
    change = LAYOUTS[layout]
    rows = [change(torch.randn(2, 3, 67, 16).to(dtype)) for _ in range(3)]
    before = [x.clone() for x in rows]
    for is_causal in (False, True):
        found = [x.detach().requires_grad_() for x in rows]
        plain = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in rows]
        out, wanted = attend(*found, is_causal=is_causal), attend(*plain, is_causal=is_causal)
        assert out.equal(wanted)
        slope = torch.randn_like(out)
        for x, y in zip(torch.autograd.grad(out, found, slope), torch.autograd.grad(wanted, plain, slope), strict=True):
            assert x.equal(y)
        assert all(x.equal(y) for x, y in zip(rows, before, strict=True))


@pytest.mark.parametrize("layout", ["expanded", "strided", "channels"])
def test_the_gradient_of_the_output_may_lie_anyhow(layout: str) -> None:
    leaves = [torch.randn(2, 3, 37, 8).requires_grad_() for _ in range(3)]
    out, lse = multi_level_attention(*leaves, levels=LEVELS, impl="native", return_lse=True)
    slope, of_lse = torch.ones(()).expand_as(out), torch.ones(()).expand_as(lse)
    if layout != "expanded":
        slope = (
            torch.randn(2, 3, 8, 37).mT if layout == "strided" else torch.randn(2, 37, 3, 16).transpose(1, 2)[..., ::2]
        )
        of_lse = torch.randn(2, 37, 3).transpose(1, 2)
    found = torch.autograd.grad((out, lse), leaves, (slope, of_lse), retain_graph=True)
    wanted = torch.autograd.grad((out, lse), leaves, (slope.contiguous(), of_lse.contiguous()))
    assert all(x.equal(y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="memory without pages is asked for as Linux does")
def test_numbers_far_apart_in_memory() -> None:
    # the last row lies 2.5 * 2**31 numbers after the first; pages are given when they are touched (MAP_NORESERVE)
    step = 2**28
    memory = mmap.mmap(-1, 4 * (20 * step + 64), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    flat = torch.frombuffer(memory, dtype=torch.float32)
    rows = [flat[16 * at :].as_strided((1, 1, 21, 8), (0, 0, step, 1)) for at in range(3)]
    for x in rows:
        x.copy_(torch.randn(x.shape))
    assert attend(*rows, levels=LOCAL).equal(attend(*(x.contiguous() for x in rows), levels=LOCAL))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone_and_outputs_are_new(kind: str) -> None:
    leaves = clone(
        inputs(Case(name=kind, tokens=37, padding="right", **KINDS[kind]), torch.float32), requires_grad=True
    )
    before = clone(leaves)
    out, lse = multi_level_attention(**leaves, impl="native", return_lse=True)
    out.sum().backward()
    given = {x.untyped_storage().data_ptr() for x in leaves.values() if isinstance(x, Tensor)}
    given |= {x.untyped_storage().data_ptr() for x in gradients(leaves).values()}
    assert not given & {x.untyped_storage().data_ptr() for x in (out, lse)}
    for name, value in before.items():
        assert not isinstance(value, Tensor) or value.equal(leaves[name]), name


def test_an_output_that_was_changed_cannot_be_differentiated() -> None:
    leaves = clone(inputs(Case(name="changed"), torch.float32), requires_grad=True)
    out = multi_level_attention(**leaves, impl="native")
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_gradient_of_a_gradient() -> None:
    leaves = clone(inputs(Case(name="twice"), torch.float32), requires_grad=True)
    out = multi_level_attention(**leaves, impl="native")
    (slope,) = torch.autograd.grad(out.square().sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        slope.sum().backward()


def test_without_gradients_it_is_the_same() -> None:
    arguments = inputs(Case(name="no_grad", tokens=101), torch.float32)
    wanted = multi_level_attention(**clone(arguments, requires_grad=True), impl="native").detach()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert multi_level_attention(**arguments, impl="native").equal(wanted)


def test_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_ISA", "sse9")
    with pytest.raises(ImplementationError, match="'sse9' is not known"):
        attend(*split(fused()))
    assert multi_level_attention(*split(fused()), levels=LEVELS).isfinite().all()


_ROW = torch.zeros(1, 3, 7, 8)
_ENDLESS = torch.zeros(1).expand(1, 3, 2**31, 8)


@pytest.mark.parametrize("levels", [LEVELS, STRICT, replace(STRICT, ratio=LevelRatio(0, 1, 1))], ids=str)
@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (_ROW.double(), ImplementationError, r"the type is torch.float64; float32 and bfloat16 .*use impl='blocked'"),
        (_ROW.half(), ImplementationError, "the type is torch.float16"),
        (_ROW.int(), ShapeError, r"query must be floating point .*torch.int32"),
        (_ROW.to("meta"), ImplementationError, "tensors are on meta; the kernels run on a CPU. Use impl='auto'"),
        (torch.zeros(1, 3, 7, 257), ImplementationError, "head dimension is 257, at most 256 .*Use impl='blocked'"),
        (_ENDLESS, ImplementationError, "rows have 2147483648 tokens, at most .*Split the rows"),
        (_ROW[:, :, :0], ShapeError, r"query \(1, 3, 0, 8\).* have no token; at least one"),
        (_ROW[:0], ShapeError, "have no row; at least one"),
        (_ROW[..., :0], ShapeError, "have no dimension; at least one"),
        (_ROW[:, :0], ShapeError, "have no head; at least one"),
    ],
    ids=["float64", "float16", "int32", "meta", "dim_257", "endless", "no_token", "no_row", "no_dimension", "no_head"],
)
def test_what_it_cannot_run_is_told(row: Tensor, error: type[Exception], message: str, levels: Levels) -> None:
    with pytest.raises(error, match=message):
        multi_level_attention(row, row, row, levels=levels, impl="native")


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"key": _ROW[:, :2]}, ShapeError),
        ({"key": _ROW.bfloat16()}, ShapeError),
        ({"value": _ROW[:, :, :5]}, ShapeError),
        ({"value": _ROW.to("meta")}, ShapeError),
        ({"key": _ROW.to("meta"), "value": _ROW.to("meta")}, ShapeError),
        ({"padding_mask": torch.zeros(1, 7, dtype=torch.bool, device="meta")}, ShapeError),
        ({"global_score": torch.zeros(1, 7, device="meta")}, ShapeError),
        ({"pool_weight": torch.zeros(3, 8, device="meta")}, ShapeError),
        ({"padding_mask": torch.zeros(7, dtype=torch.bool)}, ShapeError),
        ({"levels": STRICT, "is_causal": True}, ConfigError),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], error: type[Exception]) -> None:
    given: dict[str, Any] = {"query": _ROW, "key": _ROW, "value": _ROW, "levels": LEVELS, **changes}
    with pytest.raises(error):
        multi_level_attention(**given, impl="native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_auto_runs_other_types_without_it(dtype: torch.dtype) -> None:
    out = multi_level_attention(*split(fused(dtype=dtype)), levels=LEVELS)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_two_threads_of_python_at_once() -> None:
    cases = [replace(case, tokens=197, dim=16) for case in CASES if case.name in ("sinks-causal", "union-both_ways")]
    every = [round_scores(inputs(case, dtype)) for case in cases for dtype in DTYPES]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    wanted = [results(arguments, "native") for arguments in every]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda arguments: results(arguments, "native"), every * 8))
    torch.set_num_threads(before)
    for index, told in enumerate(found):
        assert all(told[name].equal(x) for name, x in wanted[index % len(every)].items())


_FORK = """
import os, signal, sys, torch
from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

torch.manual_seed(3)
torch.set_num_threads(2)
rows = [torch.randn(2, 3, 131, 16).requires_grad_() for _ in range(3)]
levels = Levels(ratio=LevelRatio(1, 1, 1), window=9, region_size=8)

def run():
    out = multi_level_attention(*rows, levels=levels, impl="native")
    return torch.cat([x.flatten() for x in (out, *torch.autograd.grad(out.square().sum(), rows))]).detach()

wanted = run()
child = os.fork()
if not child:
    # what the worker of a torch DataLoader does; libgomp's threads do not survive a fork
    torch.set_num_threads(1)
    signal.alarm(60)
    os._exit(0 if run().equal(wanted) else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert run().equal(wanted)
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_worker_with_one_thread_runs_after_its_parent_did() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
