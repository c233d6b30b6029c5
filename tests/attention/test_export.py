"""One graph for every length: `torch.export` with dynamic batch and tokens, `torch.compile` without a break."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=8, num_global_tokens=3)
KINDS: dict[str, dict[str, Any]] = {
    "both_ways": {"levels": LEVELS},
    "causal": {"levels": LEVELS, "is_causal": True},
    "num_regions": {"levels": replace(LEVELS, region_size=None, num_regions=5)},
    "sinks_union": {"levels": replace(LEVELS, num_sinks=2, union=True)},
    "strict": {"levels": replace(LEVELS, mode="strict")},
}
# tracing takes seconds a kind: two by default, the others with the slow tests
SOME = ["both_ways", "strict", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:4])]
# lengths that fill their last block and lengths that do not
SIZES = [(3, 41), (2, 64), (2, 131)]


class Masked(nn.Module):
    """The layer with its masks as positional inputs."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = MultiLevelAttention(24, 3, rope_theta=100.0, impl="blocked", **options)

    def forward(self, x: Tensor, padding_mask: Tensor, segment_ids: Tensor) -> Tensor:
        out: Tensor = self.layer(x, padding_mask=padding_mask, segment_ids=segment_ids, num_segments=3)
        return out


def draw(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, tokens, 24)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[:, tokens - tokens // 7 :] = True
    segment = (torch.arange(tokens) * 3 // tokens).expand(batch, tokens).contiguous()
    return x, padding, segment


@pytest.mark.parametrize("kind", SOME)
def test_export_with_dynamic_batch_and_tokens(kind: str) -> None:
    module = Masked(**KINDS[kind]).eval()
    # AUTO: the exporter finds the range itself; it cannot prove its own divisibility guards for a named one
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(module, draw(2, 53), dynamic_shapes=(dims, dims, dims), strict=False)
        for size in SIZES:
            given = draw(*size)
            torch.testing.assert_close(program.module()(*given), module(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SOME)
def test_compiled_in_one_graph_equals_eager(kind: str) -> None:
    module = Masked(**KINDS[kind])
    # the graph is traced whole and differentiated, but not handed to a C++ compiler: that one is the slow test
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        given = draw(*size)
        wanted, found = module(*given), compiled(*given)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        parameters = list(module.parameters())
        theirs = torch.autograd.grad(wanted.square().sum(), parameters)
        for ours, other in zip(torch.autograd.grad(found.square().sum(), parameters), theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SOME)
def test_one_graph_for_all_lengths(kind: str) -> None:
    torch.compiler.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(Masked(**KINDS[kind]), fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for size in ((2, 41), (3, 64), (5, 131), (7, 97)):
            compiled(*draw(*size))
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["both_ways", "causal"])
def test_compiled_to_machine_code_equals_eager(kind: str) -> None:
    module = Masked(**KINDS[kind])
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for size in SIZES:
        given = draw(*size)
        torch.testing.assert_close(compiled(*given), module(*given), rtol=1e-4, atol=1e-4)
