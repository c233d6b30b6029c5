"""`impl="graph"`, what is exported: the reference's numbers for everything it takes, a clear error for the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trilevel.attention.api import dense_attention, dense_call, multi_level_attention
from trilevel.attention.impl import graph, graph_entries
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ImplementationError

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=4, num_global_tokens=3)
SIZES = [
    LEVELS,
    replace(LEVELS, window=33, region_size=16, num_global_tokens=8, num_sinks=2),
    replace(LEVELS, window=17, region_size=64, num_global_tokens=64, num_sinks=5),
    replace(LEVELS, window=257, region_size=7, num_global_tokens=5),
    replace(LEVELS, window=1, region_size=1, num_global_tokens=1),
]


def draw(heads: int, kv_heads: int, tokens: int, *, is_padded: bool) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Queries, keys and values of two rows, and what else a call takes."""
    sizes = ((heads, tokens), (kv_heads, tokens), (kv_heads, tokens))
    vectors = tuple(torch.randn(2, rows, count, 7, dtype=torch.float64) for rows, count in sizes)
    padding = torch.zeros(2, tokens, dtype=torch.bool)
    padding[1, max(1, tokens * 2 // 3) :] = True
    return vectors, {
        "pool_weight": torch.randn(kv_heads, 7, dtype=torch.float64),
        "global_score": torch.randn(2, tokens, dtype=torch.float64),
        "padding_mask": padding if is_padded else None,
    }


@pytest.fixture(params=["blocks", "whole"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two forms, whatever the number of tokens."""
    monkeypatch.setattr(graph, "has_few_tokens", lambda _call: request.param == "whole")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("levels", SIZES, ids=range(len(SIZES)))
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 3)])
def test_equals_the_reference(levels: Levels, is_padded: bool, heads: int, kv_heads: int) -> None:
    for tokens in (1, 2, 7, 33, 61, 131, 257):
        vectors, options = draw(heads, kv_heads, tokens, is_padded=is_padded)
        wanted = multi_level_attention(*vectors, levels=levels, impl="reference", **options)
        found = multi_level_attention(*vectors, levels=levels, impl="graph", **options)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("ratio", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 1)])
def test_any_ratio_without_scores_and_pooling(ratio: tuple[int, int, int]) -> None:
    levels = replace(LEVELS, ratio=LevelRatio(*ratio))
    vectors, _ = draw(3, 3, 61, is_padded=False)
    found = multi_level_attention(*vectors, levels=levels, impl="graph")
    torch.testing.assert_close(found, multi_level_attention(*vectors, levels=levels, impl="reference"))


@pytest.mark.usefixtures("form")
def test_equal_scores_go_to_the_earlier_token() -> None:
    vectors, options = draw(3, 3, 61, is_padded=True)
    options["global_score"] = torch.zeros_like(options["global_score"])
    options["global_score"][:, 40] = 1.0
    found = multi_level_attention(*vectors, levels=LEVELS, impl="graph", **options)
    wanted = multi_level_attention(*vectors, levels=LEVELS, impl="reference", **options)
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("form")
def test_short_input_is_dense_attention() -> None:
    vectors, options = draw(6, 3, 13, is_padded=True)
    del options["pool_weight"], options["global_score"]
    wide = multi_level_attention(*vectors, levels=replace(LEVELS, window=27), impl="graph", **options)
    torch.testing.assert_close(wide, dense_attention(dense_call(*vectors, **options)))
    chosen = multi_level_attention(*vectors, levels=replace(LEVELS, dense_below=14), impl="graph", **options)
    torch.testing.assert_close(chosen, wide)


@pytest.mark.parametrize(
    ("levels", "options", "name"),
    [
        (LEVELS, {"is_causal": True}, "causal"),
        (replace(LEVELS, mode="strict"), {}, "strict"),
        (replace(LEVELS, union=True), {}, "union"),
        (replace(LEVELS, region_size=None, num_regions=3), {}, "num_regions"),
        (replace(LEVELS, selection_gradient="gate"), {}, "gate"),
        (LEVELS, {"return_lse": True}, "return_lse"),
        (LEVELS, {"segment_ids": torch.zeros(2, 13, dtype=torch.long)}, "segment_ids"),
        (LEVELS, {"global_forced": torch.zeros(2, 13, dtype=torch.bool)}, "global_forced"),
    ],
)
def test_what_cannot_be_exported_is_named(levels: Levels, options: dict[str, Any], name: str) -> None:
    vectors, _ = draw(3, 3, 13, is_padded=False)
    with pytest.raises(ImplementationError, match=rf"graph.*{name}.*impl='auto'"):
        multi_level_attention(*vectors, levels=levels, impl="graph", **options)


def test_padding_in_front_is_refused() -> None:
    vectors, options = draw(3, 3, 13, is_padded=True)
    options["padding_mask"] = options["padding_mask"].flip(1)
    with pytest.raises(ImplementationError, match="behind its last real token"):
        multi_level_attention(*vectors, levels=LEVELS, impl="graph", **options)


@pytest.mark.parametrize(("levels", "dense"), [(LEVELS, 0), (LEVELS, 1), (None, 0)])
def test_one_exported_program_for_every_length(levels: Levels | None, dense: int) -> None:
    torch.manual_seed(3)
    layer = MultiLevelAttention(32, 4, levels=levels, num_dense_heads=dense, rope_theta=100.0, impl="graph").eval()

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            out: Tensor = layer(x, padding_mask=padding)
            return out

    def given(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        padding = torch.zeros(batch, tokens, dtype=torch.bool)
        padding[1:, tokens * 3 // 4 :] = True
        return torch.randn(batch, tokens, 32), padding

    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(Masked(), given(2, 53), dynamic_shapes=(dims, dims), strict=False).module()
        assert not [node.name for node in program.graph.nodes if "scatter" in node.name]
        # the program asks for two blocks of queries; ONNX does not (tests/artifact)
        for size in ((1, 64), (3, 41), (2, 131)):
            x, padding = given(*size)
            torch.testing.assert_close(program(x, padding), layer(x, padding_mask=padding), rtol=1e-5, atol=1e-5)


def test_a_graph_chooses_as_a_stable_sort_does() -> None:
    score = torch.tensor([[3, 1, 3, 2, 3, 2, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0], [5, 6, 7, 8, 8, 7, 6, 5]]).float()
    for count in range(1, 9):
        wanted = score.sort(dim=1, descending=True, stable=True).indices[:, :count]
        found = graph_entries.first_of_best(score, count)
        assert [set(row.tolist()) for row in found] == [set(row.tolist()) for row in wanted]
