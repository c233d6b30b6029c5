from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError, ShapeError
from trilevel.model import block
from trilevel.model.config import EncoderConfig, LayerLevels
from trilevel.model.encoder import Encoder, dense_twin, with_levels
from trilevel.model.patches import Patches
from trilevel.model.stack import BlockStack
from trilevel.model.weights import copy_shared

VOCAB, DIM, LAYERS, BATCH, TOKENS = 37, 24, 3, 2, 29
LEVELS = Levels(ratio=LevelRatio(2, 1, 1), window=5, region_size=7, num_global_tokens=3)
STRICT = dataclasses.replace(LEVELS, mode="strict")


def encoder(levels: LayerLevels = LEVELS, **changes: Any) -> Encoder:
    sizes = {"vocab_size": VOCAB, "dim": DIM, "num_heads": 4, "num_layers": LAYERS}
    return Encoder(EncoderConfig(**(sizes | {"levels": levels} | changes)))


def tokens(batch: int = BATCH, length: int = TOKENS) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length))


def sharpen(model: nn.Module) -> None:
    """Weights large enough that attention is far from uniform and errors show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


# definition


def test_dense_encoder_is_the_formula() -> None:
    model = encoder(None, rope_theta=None)
    sharpen(model)
    ids = tokens()
    x = model.embedding.table.weight[ids]
    for part in model.stack.blocks:
        assert isinstance(part, block.Block)
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(1, 2)
            for t in part.attention.in_proj(part.attention_norm(x)).chunk(3, dim=-1)
        )
        weights = (q @ k.transpose(-1, -2) / (DIM // 4) ** 0.5).softmax(dim=-1)
        x = x + part.attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + part.ffn.down(F.gelu(part.ffn.up(part.ffn_norm(x))))
    torch.testing.assert_close(model(ids), model.stack.final_norm(x))


POST_NORM = {"norm_first": False, "has_final_norm": False, "rope_theta": None, "norm_eps": 0.1}
GATED = {"is_gated": True, "has_first_norm": False, "has_embedding_norm": True, "bias": False, "norm_bias": False}
IMAGES = {"vocab_size": None, "patches": Patches(image_size=(6, 15), patch_size=(2, 5), num_channels=2)}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dense_encoder_is_that_of_torch(norm_first: bool, activation: Any) -> None:
    model = encoder(None, **(POST_NORM | {"norm_first": norm_first, "activation": activation, "ffn_dim": 37}))
    sharpen(model)
    layer = nn.TransformerEncoderLayer(
        DIM, 4, 37, 0.0, activation, layer_norm_eps=0.1, batch_first=True, norm_first=norm_first
    )
    theirs = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    names = {
        "self_attn.in_proj_": "attention.in_proj.",
        "self_attn.out_proj.": "attention.out_proj.",
        "linear1.": "ffn.up.",
        "linear2.": "ffn.down.",
        "norm1.": "attention_norm.",
        "norm2.": "ffn_norm.",
    }
    for index in range(LAYERS):
        state = model.stack.blocks[index].state_dict()
        theirs.layers[index].load_state_dict(
            {their + leaf: state[our + leaf] for their, our in names.items() for leaf in ("weight", "bias")}
        )
    ids = tokens()
    wanted = theirs(model.embedding(ids))
    torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), wanted, rtol=1e-4, atol=1e-5)


def test_gated_encoder_without_biases_is_the_formula() -> None:
    model = encoder(None, **GATED, rope_theta=None)
    sharpen(model)
    assert not [name for name in model.state_dict() if name.endswith("bias")]
    ids = tokens()
    x = model.embedding.norm(model.embedding.table.weight[ids])
    for index, part in enumerate(model.stack.blocks):
        assert isinstance(part, block.Block)
        start = x if index == 0 else part.attention_norm(x)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in part.attention.in_proj(start).chunk(3, dim=-1))
        x = x + part.attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        inner, gate = part.ffn.up(part.ffn_norm(x)).chunk(2, dim=-1)
        x = x + part.ffn.down(F.gelu(inner) * gate)
    torch.testing.assert_close(model(ids), model.stack.final_norm(x), rtol=1e-4, atol=1e-5)


def test_blocks_have_sizes_of_their_own() -> None:
    model = encoder(num_heads=(4, 8, 6), num_kv_heads=(4, 4, 3), head_dim=10, ffn_dim=(7, 11, 13))
    for index, (heads, kv_heads, width) in enumerate(((4, 4, 7), (8, 4, 11), (6, 3, 13))):
        part = model.stack.blocks[index]
        assert isinstance(part, block.Block)
        assert part.attention.in_proj.weight.shape == (10 * (heads + 2 * kv_heads), DIM)
        assert part.attention.out_proj.weight.shape == (DIM, 10 * heads)
        assert part.ffn.up.weight.shape == (width, DIM)
    assert model(tokens()).shape == (BATCH, TOKENS, DIM)


def test_each_block_has_its_own_rotary_base() -> None:
    thetas = (3.0, None, 700.0)
    model = encoder(None, rope_theta=thetas)
    found = [part.attention.rope_theta for part in model.stack.blocks if isinstance(part, block.Block)]
    assert tuple(found) == thetas


def test_learned_positions_follow_padding_and_segments() -> None:
    model = encoder(None, num_positions=7, positions_skip_padding=True, rope_theta=None).eval()
    sharpen(model)
    ids = tokens(1)
    padding = torch.zeros(1, TOKENS, dtype=torch.bool)
    padding[:, [0, 5, 6, 20]] = True
    segments = (torch.arange(TOKENS) >= 11).long()[None]
    with torch.no_grad():
        found = model(ids, padding_mask=padding)[~padding]
        torch.testing.assert_close(found, model(ids[~padding][None])[0], rtol=1e-4, atol=1e-5)
        packed = model(ids, padding_mask=padding, segment_ids=segments)[~padding]
        apart = [model(ids[:, part][~padding[:, part]][None])[0] for part in (slice(0, 11), slice(11, None))]
        torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-4, atol=1e-5)
        places = dataclasses.replace(model.config, positions_skip_padding=False)
        other = Encoder(places).eval()
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(other(ids, padding_mask=padding)[~padding], found, atol=1e-2)


@pytest.mark.parametrize("levels", [None, LEVELS])
def test_images(levels: LayerLevels) -> None:
    model = encoder(levels, **IMAGES).eval()
    sharpen(model)
    pixels = torch.randn(BATCH, 2, 6, 15)
    with torch.no_grad():
        found = model(pixels)
        torch.testing.assert_close(found, model.stack(model.embedding(pixels)))
        torch.testing.assert_close(dense_twin(with_levels(model, LEVELS))(pixels), dense_twin(model)(pixels))
    assert found.shape == (BATCH, 10, DIM)
    with pytest.raises(ConfigError, match="an encoder of images has no token types"):
        model(pixels, token_type_ids=torch.zeros(BATCH, 10, dtype=torch.long))


def test_window_over_everything_equals_the_dense_twin() -> None:
    model = encoder(dataclasses.replace(LEVELS, window=2 * TOKENS + 1))
    sharpen(model)
    ids = tokens()
    torch.testing.assert_close(model(ids), dense_twin(model)(ids), rtol=1e-4, atol=1e-5)


# initialisation


def test_initialisation() -> None:
    model = encoder((LEVELS, STRICT, None), dim=96, ffn_dim=193)
    assert model.embedding.table.weight[0].eq(0).all()
    assert model.embedding.table.weight[1:].std().item() == pytest.approx(0.02, rel=0.1)
    for part in model.stack.blocks:
        assert isinstance(part, block.Block)
        residual = 0.02 / (2 * LAYERS) ** 0.5
        for linear, std in (
            (part.attention.in_proj, 0.02),
            (part.ffn.up, 0.02),
            (part.attention.out_proj, residual),
            (part.ffn.down, residual),
        ):
            assert linear.weight.std().item() == pytest.approx(std, rel=0.1)
            assert linear.bias.eq(0).all()


# invariants


@pytest.mark.parametrize("levels", [None, LEVELS, STRICT, (LEVELS, None, STRICT)])
def test_padding_changes_nothing(levels: LayerLevels) -> None:
    model = encoder(levels).eval()
    sharpen(model)
    ids = tokens(1)
    padded = torch.cat([ids, torch.zeros(1, 6, dtype=ids.dtype)], dim=1)
    rows = torch.cat([padded, tokens(1, TOKENS + 6)])
    mask = torch.zeros(2, TOKENS + 6, dtype=torch.bool)
    mask[0, TOKENS:] = True
    with torch.no_grad():
        torch.testing.assert_close(model(rows, padding_mask=mask)[:1, :TOKENS], model(ids), rtol=1e-4, atol=1e-4)


def test_packed_segments_are_separate_inputs() -> None:
    model = encoder().eval()
    sharpen(model)
    ids = tokens(1)
    segments = (torch.arange(TOKENS) >= 11).long()[None]
    with torch.no_grad():
        packed = model(ids, segment_ids=segments, num_segments=2)
        apart = torch.cat([model(ids[:, :11]), model(ids[:, 11:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)


def test_causal_encoder_ignores_the_future() -> None:
    model = encoder(is_causal=True).eval()
    sharpen(model)
    ids, other = tokens(1), tokens(1)
    other[:, :17] = ids[:, :17]
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :17], model(other)[:, :17])


@pytest.mark.parametrize("chunk", [1, 7, 4_096])
@pytest.mark.parametrize("changes", [{}, POST_NORM, GATED])
def test_inference_in_chunks_equals_the_whole(
    chunk: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "CHUNK_TOKENS", chunk)
    model = encoder(**changes).eval()
    sharpen(model)
    ids = tokens()
    whole = model(ids).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), whole, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, POST_NORM, {"has_first_norm": False}])
def test_inference_leaves_its_input_alone(changes: dict[str, Any]) -> None:
    stack = BlockStack(DIM, 4, 2, LEVELS, **changes).eval()
    x = torch.randn(BATCH, TOKENS, DIM)
    before = x.clone()
    with torch.no_grad():
        stack(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    model = encoder().eval()
    sharpen(model)
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(ids).detach()
        with torch.no_grad():
            inferred = model(ids)
    assert trained.dtype == inferred.dtype == torch.float32
    torch.testing.assert_close(inferred, trained, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        POST_NORM | {"num_positions": 17, "num_token_types": 1},
        GATED,
        IMAGES,
    ],
)
def test_every_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    model = encoder((LEVELS, STRICT, LEVELS), **changes)
    sharpen(model)
    given = torch.randn(BATCH, 2, 6, 15) if "patches" in changes else tokens()
    # not the square, whose gradient the last norm makes vanish
    (model(given) * torch.randn(DIM)).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_dropout_acts_in_training_only() -> None:
    model = encoder(dropout=0.5)
    ids = tokens()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_explain_reports_each_layer() -> None:
    model = encoder((LEVELS, None, LEVELS)).eval()
    details = model(tokens(), explain=True)
    first, second, third = details.explanations
    assert second is None
    assert first.global_index.shape == third.global_index.shape == (BATCH, 3)


def test_forced_tokens_and_priors_reach_the_attention() -> None:
    model = encoder().eval()
    forced = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    forced[:, 19] = True
    prior = torch.zeros(BATCH, TOKENS)
    prior[:, 23] = 100.0
    details = model(tokens(), global_forced=forced, global_prior=prior, explain=True)
    for explanation in details.explanations:
        assert {19, 23} <= set(explanation.global_index[0].tolist())


# the layer's own test exports the levels in the default run
@pytest.mark.parametrize("levels", [None, pytest.param(LEVELS, marks=pytest.mark.slow)])
def test_export_is_dynamic_in_the_length(levels: LayerLevels) -> None:
    model = encoder(levels).eval()
    length = torch.export.Dim.AUTO
    with torch.no_grad():
        shapes = {"input_ids": {1: length}}
        exported = torch.export.export(model, (tokens(1, 61),), dynamic_shapes=shapes, strict=False)
        # an exported graph with levels takes inputs longer than one block of 32 queries
        for n in (61, 33, 64, 97):
            ids = tokens(1, n)
            torch.testing.assert_close(exported.module()(ids), model(ids), rtol=1e-4, atol=1e-4)


# the same weights under other levels


def test_twins_share_weights_and_mode() -> None:
    model = encoder().double().eval()
    sharpen(model)
    twin = dense_twin(model)
    assert not twin.training
    assert twin.config.levels is None
    state, twin_state = model.state_dict(), twin.state_dict()
    assert twin_state.keys() < state.keys()
    for name, tensor in twin_state.items():
        assert torch.equal(tensor, state[name])
        assert tensor.data_ptr() != state[name].data_ptr()
    back = with_levels(twin, LEVELS)
    assert back.state_dict().keys() == state.keys()


def test_copy_shared_says_what_was_left() -> None:
    source, target = encoder(LEVELS, num_layers=1), encoder(None, num_layers=1)
    report = copy_shared(source, target)
    assert report.only_in_source == (
        "stack.blocks.0.attention.pool_weight",
        "stack.blocks.0.attention.scorer.weight",
    )
    assert report.only_in_target == ()
    assert set(report.copied) == set(target.state_dict())
    assert copy_shared(target, source).only_in_target == report.only_in_source


# messages


def test_messages() -> None:
    model = encoder(None, max_tokens=31)
    with pytest.raises(ShapeError, match="32 tokens and the model takes 31"):
        model(tokens(1, 32))
    with pytest.raises(ShapeError, match=r"input_ids has shape \(29,\)"):
        model(tokens()[0])
    with pytest.raises(ShapeError, match=r"type torch.float32; integers \(batch, tokens\)"):
        model(tokens().float())
    with pytest.raises(ShapeError, match=r"x has shape \(2, 3, 5\); \(batch, tokens, 24\) is needed"):
        model.stack(torch.zeros(2, 3, 5))
    with pytest.raises(ShapeError, match=r"stack.*has shape \(\d+, 24\) in the source and"):
        copy_shared(encoder(None, ffn_dim=13), encoder(None, ffn_dim=17).eval())
