"""The level map against attention written out: its rows are the attention of the layer, summed over bins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.report.level_map import explain, level_maps, record_layers, spread

TOKENS, DIM, HEADS = 53, 40, 5


class Two(nn.Module):
    """Two layers, the second dense."""

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.first = MultiLevelAttention(DIM, HEADS, levels=levels, rope_theta=1e4)
        self.second = MultiLevelAttention(DIM, HEADS, levels=None)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x, global_prior=prior), global_prior=prior)
        return out


def levels(**changes: object) -> Levels:
    base = {"ratio": LevelRatio(2, 2, 1), "window": 7, "region_size": 11, "num_global_tokens": 3}
    return Levels(**{**base, **changes})  # type: ignore[arg-type]


def written_out(layer: MultiLevelAttention, x: Tensor, prior: Tensor) -> Tensor:
    """(heads, tokens, tokens): the attention of a calibrated layer, entry by entry, plain mean pooling."""
    q, k, _ = layer.project(x)
    q, k, scale = q[0], k[0], layer.head_dim**-0.5
    assert layer.levels is not None
    radius, size = layer.levels.radius, layer.levels.region_size
    assert size is not None
    score = (layer.scorer(x).squeeze(-1) + prior)[0]
    chosen = score.topk(layer.levels.num_global_tokens).indices
    place = torch.arange(TOKENS)
    found = torch.zeros(HEADS, TOKENS, TOKENS)
    for head in range(HEADS):
        for i in range(TOKENS):
            near = (place - i).abs() <= radius
            groups = [place == j for j in place[near]]
            rest = ~near
            if head in (2, 3):
                groups += [place // size == r for r in range(-(-TOKENS // size)) if (rest & (place // size == r)).any()]
            elif head == 4:
                groups += [place == j for j in chosen if rest[j]]
                rest = rest & ~torch.isin(place, chosen)
            if head not in (2, 3) and rest.any():
                groups.append(rest)
            logit = torch.stack(
                [
                    q[head, i] @ k[head][g].mean(0) * scale + (g & (~near if g.sum() > 1 else g)).sum().log()
                    for g in groups
                ]
            )
            for weight, group in zip(logit.softmax(0), groups, strict=True):
                found[head, i] += weight * group / group.sum()
    return found


def test_a_map_is_the_layers_attention_summed_over_bins() -> None:
    model = Two(levels()).eval()
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter.mul_(3)
    x, prior = torch.randn(1, TOKENS, DIM), torch.randn(1, TOKENS)
    with record_layers(model) as recorded, torch.inference_mode():
        model(x, prior)
    assert len(recorded) == 1
    maps = level_maps(recorded[0], layer="layer 1", num_queries=TOKENS, num_bins=13)
    exact = written_out(model.first, x, prior)
    of_token = torch.arange(TOKENS) * 13 // TOKENS
    binned = torch.zeros(HEADS, TOKENS, 13).index_add(2, of_token, exact.detach())
    for shown, heads in zip(maps, (slice(0, 2), slice(2, 4), slice(4, 5)), strict=True):
        torch.testing.assert_close(torch.from_numpy(shown.mass).float(), binned[heads].mean(0), atol=1e-5, rtol=1e-4)
    assert [shown.head_class for shown in maps] == ["local", "regional", "global"]
    assert [shown.num_heads for shown in maps] == [2, 2, 1]


@pytest.mark.parametrize("mode", ["calibrated", "strict"])
def test_rows_are_shares(mode: str) -> None:
    model = Two(levels(mode=mode)).eval()
    with record_layers(model) as recorded, torch.inference_mode():
        model(torch.randn(1, TOKENS, DIM), torch.zeros(1, TOKENS))
    for shown in level_maps(recorded[0], layer="1", num_queries=17, num_bins=19):
        assert shown.mass.shape == (17, 19)
        assert (shown.mass >= 0).all()
        assert (shown.mass.sum(1) <= 1 + 1e-5).all()
        if mode == "calibrated":
            assert (shown.mass.sum(1) >= 1 - 1e-5).all()


def test_a_class_without_heads_has_no_map() -> None:
    model = Two(levels(ratio=LevelRatio(1, 0, 0)))
    with record_layers(model) as recorded, torch.inference_mode():
        model(torch.randn(1, 5, DIM), torch.zeros(1, 5))
    maps = level_maps(recorded[0], layer="1")
    assert [shown.mass.shape for shown in maps] == [(5, 5)]


def test_explain_names_the_global_tokens_of_the_call() -> None:
    model = Two(levels()).eval()
    prior = torch.zeros(1, TOKENS)
    prior[0, [2, 31, 47]] = 50.0
    with record_layers(model) as recorded, torch.inference_mode():
        model(torch.randn(1, TOKENS, DIM), prior)
    explanation = explain(recorded[0])
    assert sorted(explanation.global_index[0].tolist()) == [2, 31, 47]
    assert explanation.global_prior[0].tolist() == [50.0, 50.0, 50.0]


def test_nothing_is_recorded_afterwards() -> None:
    model = Two(levels())
    with record_layers(model) as recorded:
        pass
    model(torch.randn(1, 5, DIM), torch.zeros(1, 5))
    assert recorded == []


def test_spread_takes_first_and_last() -> None:
    model = Two(levels())
    with record_layers(model) as recorded, torch.inference_mode():
        for _ in range(7):
            model(torch.randn(1, 5, DIM), torch.zeros(1, 5))
    assert spread(recorded, 3) == [0, 3, 6]
    assert spread(recorded, 9) == list(range(7))
    assert spread(recorded, 1) == [0]


def test_dense_heads_have_no_map() -> None:
    torch.manual_seed(0)
    layer = MultiLevelAttention(DIM, HEADS, levels=levels(ratio=LevelRatio(2, 1, 0)), num_dense_heads=2)
    with record_layers(layer) as recorded:
        layer(torch.randn(1, TOKENS, DIM))
    maps = level_maps(recorded[0], layer="mixed")
    assert [(shown.head_class, shown.num_heads) for shown in maps] == [("local", 2), ("regional", 1)]
    for shown in maps:
        assert shown.mass.sum(-1) == pytest.approx(1, abs=1e-5)
