"""`native` in graphs: one node each way for all lengths, exported when asked for; and what `auto` runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.attention.cases import CASES, clone, inputs
from tests.attention.test_implementations import KINDS
from tests.attention.test_native_calls import LEVELS, fused, split
from trilevel.attention import api, library, op
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.library import NativeStatus
from trilevel.attention.native import build

pytestmark = pytest.mark.skipif(not library.is_available(), reason=f"no native library: {build.AGAIN}")


class Attend(nn.Module):
    """Attention of what a projection gives; a graph is made for its number of heads."""

    def __init__(self, impl: Impl, **options: Any) -> None:
        super().__init__()
        self.impl, self.options = impl, options

    def forward(self, projected: Tensor, score: Tensor, padding: Tensor, ids: Tensor) -> Tensor:
        out: Tensor = multi_level_attention(
            *split(projected), global_score=score, padding_mask=padding, segment_ids=ids, num_segments=3,
            impl=self.impl, **self.options,
        )  # fmt: skip
        return out


def draw(batch: int, tokens: int) -> tuple[Tensor, ...]:
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[:, tokens - tokens // 7 :] = True
    ids = (torch.arange(tokens) * 3 // tokens).expand(batch, tokens).contiguous()
    return (fused(batch, tokens).requires_grad_(), torch.randn(batch, tokens).requires_grad_(), padding, ids)


def nodes(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if "trilevel" in str(node.target)]


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("kind", ["causal", pytest.param("sinks_union", marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", ["native", "auto"])
def test_one_node_forward_and_one_backward_for_all_lengths(impl: Impl, kind: str) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]

    seen: dict[str, list[list[str]]] = {"forward": [], "backward": []}

    def compiler(way: str) -> Any:
        def count(graph: torch.fx.GraphModule, _: Any) -> Any:
            seen[way].append(nodes(graph))
            return make_boxed_func(graph.forward)

        return count

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    module = Attend(impl, **KINDS[kind])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for size in ((2, 53), (3, 131), (2, 97)):
        given = draw(*size)
        found, wanted = compiled(*given), module(*given)
        assert found.equal(wanted)
        slope, leaves = torch.randn_like(wanted), given[:2]
        for x, y in zip(
            torch.autograd.grad(found, leaves, slope), torch.autograd.grad(wanted, leaves, slope), strict=True
        ):
            assert x.equal(y)
    assert seen == {
        "forward": [["trilevel.attention.default"]],
        "backward": [["trilevel.attention_backward.default"]],
    }


def export(impl: Impl, **options: Any) -> Any:
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        return torch.export.export(Attend(impl, **options), draw(2, 53), dynamic_shapes=(dims,) * 4, strict=False)


def test_an_exported_graph_keeps_the_operator_when_it_is_asked_for() -> None:
    program = export("native", **KINDS["causal"])
    assert nodes(program.graph_module) == ["trilevel.attention.default"]
    for size in ((3, 41), (2, 131)):
        given = draw(*size)
        assert program.module()(*given).equal(Attend("native", **KINDS["causal"])(*given))


@pytest.mark.slow
def test_an_exported_graph_of_auto_has_torchs_own_operators() -> None:
    assert not nodes(export("auto", **KINDS["both_ways"]).graph_module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("base-causal", torch.float32),
        ("segments_padding-both_ways", torch.bfloat16),
        pytest.param("no_extras-both_ways", torch.float32, marks=pytest.mark.slow),
        pytest.param("union_gate-causal", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_operator_keeps_torchs_rules(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []
    real: Any = op._attention

    def catch(*arguments: Any) -> Any:
        given.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(op, "_attention", catch)
    case = next(case for case in CASES if case.name == name)
    multi_level_attention(**clone(inputs(case, dtype), requires_grad=True), impl="native", return_lse=True)
    (arguments,) = given
    leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in arguments)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    told = torch.library.opcheck(torch.ops.trilevel.attention.default, leaves, test_utils=tests)
    assert set(told.values()) == {"SUCCESS"}


@pytest.mark.parametrize("active", ["avx2", None])
def test_auto_runs_native_where_it_is_and_says_so_once(
    active: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran: list[str] = []

    def spy(impl: str, run: Any) -> Any:
        def attend(call: Any) -> Any:
            ran.append(impl)
            return run(call)

        return attend

    for impl, run in list(api.IMPLEMENTATIONS.items()):
        monkeypatch.setitem(api.IMPLEMENTATIONS, impl, spy(impl, run))
    monkeypatch.setattr(library, "status", lambda: NativeStatus(active, (), "for this reason"))
    api._say_once.cache_clear()
    rows = split(fused())
    with caplog.at_level(logging.INFO, logger=api.__name__):
        for _ in range(3):
            multi_level_attention(*rows, levels=LEVELS)
        multi_level_attention(*(x.double() for x in rows), levels=LEVELS)
    reason = "the type is torch.float64; float32 and bfloat16 are built in. Convert, or use impl='blocked'."
    assert ran == [*["native" if active else "blocked"] * 3, "blocked"]
    assert [record.message for record in caplog.records] == [
        f"impl='auto' runs {active or 'blocked'} on a CPU: for this reason",
        f"impl='auto' runs blocked: {reason}",
    ]
    api._say_once.cache_clear()
