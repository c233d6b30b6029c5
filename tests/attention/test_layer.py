"""The layer: projections around the function, the dense twin, positions, explanations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.attention.cases import BASE, STRICT
from tests.attention.oracle import oracle
from trilevel.attention.cost import attention_cost
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError

EACH = LevelRatio(1, 1, 1)
TOKENS, DIM = 19, 42


def make(levels: Levels | None, **options: object) -> MultiLevelAttention:
    layer = MultiLevelAttention(DIM, 6, levels=levels, num_kv_heads=3, dtype=torch.float64, **options)  # type: ignore[arg-type]
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def tokens(seed: int = 3) -> Tensor:
    return torch.randn(2, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
def test_layer_is_the_function_between_its_projections(is_causal: bool) -> None:
    levels = replace(BASE, num_sinks=2)
    layer, x = make(levels, is_causal=is_causal), tokens()
    prior = torch.randn(2, TOKENS, dtype=torch.float64)
    forced = torch.zeros(2, TOKENS, dtype=torch.bool)
    forced[:, 5] = True
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[0, 13:] = True
    q, k, v = layer.in_proj(x).view(2, TOKENS, 12, 7).transpose(1, 2).split([6, 3, 3], 1)
    attended, _ = oracle(
        q,
        k,
        v,
        levels=levels,
        pool_weight=layer.pool_weight,
        global_score=layer.scorer(x).squeeze(-1),
        global_prior=prior,
        global_forced=forced,
        padding_mask=padding,
        is_causal=is_causal,
    )
    wanted = layer.out_proj(attended.transpose(1, 2).reshape(2, TOKENS, DIM))
    out = layer(x, padding_mask=padding, global_prior=prior, global_forced=forced)
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-11)


def test_heads_may_be_of_another_width() -> None:
    layer, x = make(BASE, head_dim=11), tokens()
    assert layer.in_proj.weight.shape == (12 * 11, DIM)
    assert layer.out_proj.weight.shape == (DIM, 6 * 11)
    q, k, v = layer.in_proj(x).view(2, TOKENS, 12, 11).transpose(1, 2).split([6, 3, 3], 1)
    score = layer.scorer(x).squeeze(-1)
    attended, _ = oracle(q, k, v, levels=BASE, pool_weight=layer.pool_weight, global_score=score)
    wanted = layer.out_proj(attended.transpose(1, 2).reshape(2, TOKENS, 66))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-11)
    # attention's own share and the three projections
    scored, read = 2 * 38 * DIM, 2 * 38 * DIM * 18 * 11
    attention = attention_cost(BASE, batch=2, num_heads=6, num_kv_heads=3, tokens=19, head_dim=11, bytes_per_value=8)
    assert layer.cost(2, 19).flops == attention.flops + read + scored


def test_wrong_head_widths_are_named() -> None:
    with pytest.raises(ConfigError, match="head_dim=0 must be >= 1; None takes embed_dim // num_heads"):
        make(BASE, head_dim=0)
    with pytest.raises(ConfigError, match="even head size, got 11"):
        make(BASE, head_dim=11, rope_theta=10.0)


def test_strict_layer_learns_a_gate() -> None:
    layer, x = make(STRICT), tokens()
    q, k, v = layer.project(x)
    attended, _ = oracle(
        q,
        k,
        v,
        levels=STRICT,
        pool_weight=layer.pool_weight,
        global_score=layer.scorer(x).squeeze(-1),
        region_gate=layer.region_gate(x),
    )
    wanted = layer.out_proj(attended.transpose(1, 2).reshape(2, TOKENS, DIM))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-11, atol=1e-11)


def test_new_layer_starts_calibrated() -> None:
    layer = MultiLevelAttention(DIM, 6, levels=STRICT)
    assert layer.pool_weight is not None
    assert not layer.pool_weight.any()
    assert not layer.region_gate.weight.any()


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
def test_dense_twin_with_the_same_weights_is_the_limit(is_causal: bool) -> None:
    wide = make(replace(BASE, window=2 * TOKENS + 1), is_causal=is_causal, impl="blocked")
    dense = make(None, is_causal=is_causal)
    dense.load_state_dict({name: value for name, value in wide.state_dict().items() if "proj" in name})
    x, padding = tokens(), torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1, :5] = True
    segment = (torch.arange(TOKENS) // 11).expand(2, TOKENS)
    for mask in (None, padding):
        for ids in (None, segment):
            wanted = wide(x, padding_mask=mask, segment_ids=ids)
            torch.testing.assert_close(dense(x, padding_mask=mask, segment_ids=ids), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("levels", [BASE, None], ids=["levels", "dense"])
def test_rotary_positions_are_relative(levels: Levels | None) -> None:
    layer = MultiLevelAttention(48, 6, levels=levels, rope_theta=100.0, dtype=torch.float64)
    x = torch.randn(2, TOKENS, 48, dtype=torch.float64)
    at = torch.arange(TOKENS)[None]
    out = layer(x)
    torch.testing.assert_close(layer(x, positions=at), out)
    torch.testing.assert_close(layer(x, positions=at + 57), out, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(layer(x, positions=2 * at), out)


def test_explanation_names_the_global_tokens_and_why() -> None:
    layer, x = make(BASE), tokens()
    prior = torch.zeros(2, TOKENS, dtype=torch.float64)
    prior[:, 11] = 1000
    forced = torch.zeros(2, TOKENS, dtype=torch.bool)
    forced[:, 4] = True
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[0, 13:] = True
    out, why = layer(x, global_prior=prior, global_forced=forced, padding_mask=padding, explain=True)
    torch.testing.assert_close(out, layer(x, global_prior=prior, global_forced=forced, padding_mask=padding))
    assert tuple(why.split) == (2, 2, 2)
    assert why.global_index[:, :2].tolist() == [[4, 11], [4, 11]]
    assert why.global_forced.tolist() == [[True, False, False]] * 2
    assert why.global_prior.tolist() == [[0, 1000, 0]] * 2
    score = layer.scorer(x).squeeze(-1).detach()
    torch.testing.assert_close(why.global_score, score.gather(1, why.global_index))
    for row, end in ((0, 13), (1, TOKENS)):
        others = [j for j in range(end) if j not in (4, 11)]
        assert int(why.global_index[row, 2]) == max(others, key=lambda j: float(score[row, j]))
    assert why.region_index[1].tolist() == [j // 4 for j in range(TOKENS)]


def test_explanation_of_a_row_shorter_than_p() -> None:
    layer = make(replace(BASE, num_global_tokens=7))
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    padding[:, :5] = False
    _, why = layer(tokens(), padding_mask=padding, explain=True)
    assert why.global_valid.sum(1).tolist() == [5, 5]
    assert sorted(why.global_index[0][why.global_valid[0]].tolist()) == [0, 1, 2, 3, 4]


def test_every_parameter_learns() -> None:
    for levels in (BASE, STRICT):
        layer = make(levels)
        layer(tokens()).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


def test_state_loads_into_a_layer_of_the_same_levels() -> None:
    first, second = make(STRICT), make(STRICT)
    second.load_state_dict(first.state_dict())
    assert second(tokens()).equal(first(tokens()))


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("rope_theta", [None, 100.0], ids=["no_positions", "rotary"])
def test_dense_heads_see_everything_and_the_others_share_the_ratio(is_causal: bool, rope_theta: float | None) -> None:
    levels = replace(BASE, ratio=LevelRatio(1, 1, 0))
    layer = MultiLevelAttention(
        48, 6, levels=levels, num_kv_heads=3, num_dense_heads=2, is_causal=is_causal, rope_theta=rope_theta,
        dtype=torch.float64,
    )  # fmt: skip
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert layer.head_split == (2, 2, 0)
    assert layer.pool_weight is not None
    assert layer.pool_weight.shape == (2, 8)
    x = torch.randn(2, TOKENS, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1, 11:] = True
    q, k, v = layer.project(x.masked_fill(padding[..., None], 0))
    near, _ = oracle(
        q[:, :4], k[:, :2], v[:, :2], levels=levels, pool_weight=layer.pool_weight, padding_mask=padding,
        is_causal=is_causal,
    )  # fmt: skip
    sees = ~padding[:, None, None].expand(2, 1, TOKENS, TOKENS)
    if is_causal:
        sees = sees & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    dense = nn.functional.scaled_dot_product_attention(q[:, 4:], k[:, 2:], v[:, 2:], attn_mask=sees, enable_gqa=True)
    wanted = layer.out_proj(torch.cat([near, dense], 1).transpose(1, 2).flatten(2))
    real = ~padding
    torch.testing.assert_close(layer(x, padding_mask=padding)[real], wanted[real], rtol=1e-11, atol=1e-11)


def test_dense_heads_cost_what_dense_attention_costs() -> None:
    few, all_ = (make_wide(heads).cost(3, 4_096) for heads in (2, 0))
    assert few.flops > 2 * all_.flops


def make_wide(num_dense_heads: int) -> MultiLevelAttention:
    return MultiLevelAttention(48, 6, levels=Levels(ratio=LevelRatio(1, 1, 0)), num_dense_heads=num_dense_heads)


@pytest.mark.parametrize("dense", [-1, 6, 7])
def test_dense_heads_stand_beside_others(dense: int) -> None:
    with pytest.raises(ConfigError, match="must be 0 to 5 of 6 heads"):
        make(BASE, num_dense_heads=dense)
    with pytest.raises(ConfigError, match="must be 0 to 5 of 6 heads"):
        make(None, num_dense_heads=2)
    with pytest.raises(ConfigError, match="whole groups of 2"):
        make(BASE, num_dense_heads=1)


def test_dense_heads_have_no_decode_cache() -> None:
    layer = make(replace(BASE, ratio=LevelRatio(1, 1, 0)), num_dense_heads=2, is_causal=True)
    with pytest.raises(ConfigError, match="levels in all heads"):
        layer.new_cache(1)
