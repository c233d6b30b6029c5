"""Profiles of heads, against a model in which one head was really changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conversion.dense import DIM, HEADS, LAYERS, attention_of, dense_encoder, ids
from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion.profile import ALONE, HeadProfile, fit_scorers, profile_heads
from trilevel.errors import ConfigError, InputError
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

LEVELS = Levels(window=5, region_size=3, num_global_tokens=4)
SEQUENCES = ids((19, 23, 17, 13))


def profiled(encoder: Encoder, scorers: list[Tensor], levels: Levels = LEVELS) -> HeadProfile:
    blocks = list(encoder.stack.blocks)
    return profile_heads(blocks, encoder, SEQUENCES, levels, scorers)


def some_scorers() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(DIM, generator=generator) for _ in range(LAYERS)]


def read_by(encoder: Encoder, layer: int, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """What the attention of a layer reads, and the stream its output is added to."""
    found: list[Tensor] = []
    block = encoder.stack.blocks[layer]
    handles = [
        module.register_forward_pre_hook(lambda _module, given: found.append(given[0]))
        for module in (block, attention_of(encoder, layer))
    ]
    with torch.no_grad():
        encoder(sequence[None])
    for handle in handles:
        handle.remove()
    return found[1], found[0]


# definition


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("place", [0, 1, 2], ids=["local", "regional", "global"])
def test_the_error_is_what_the_layer_s_output_changes_by(norm_first: bool, place: int) -> None:
    encoder, scorers = dense_encoder(norm_first=norm_first), some_scorers()
    found = profiled(encoder, scorers).error
    layer, head = 1, 3
    attention = attention_of(encoder, layer)
    changed = stream = 0.0
    for sequence in SEQUENCES:
        x, added_to = read_by(encoder, layer, sequence)
        with torch.no_grad():
            q, k, v = attention.project(x)
            dense = nn.functional.scaled_dot_product_attention(q, k, v)
            score = (x @ scorers[layer].double()).float()
            other = multi_level_attention(
                q, k, v, levels=replace(LEVELS, ratio=ALONE[place]), global_score=score if place == 2 else None,
                impl="reference",
            )  # fmt: skip
            assert isinstance(other, Tensor)
            mixed = dense.clone()
            mixed[:, head] = other[:, head]
            before, after = (attention.out_proj(part.transpose(1, 2).flatten(2)) for part in (dense, mixed))
        changed += float((after - before).square().sum())
        stream += float(added_to.square().sum())
    assert found[layer, head, place] == pytest.approx(changed / stream, rel=1e-6)


def test_masses_and_entropy_are_those_of_the_attention() -> None:
    encoder = dense_encoder()
    found = profiled(encoder, some_scorers())
    layer, head = 2, 1
    near = sink = entropy = 0.0
    tokens = sum(len(sequence) for sequence in SEQUENCES)
    for sequence in SEQUENCES:
        x, _ = read_by(encoder, layer, sequence)
        with torch.no_grad():
            q, k, _ = attention_of(encoder, layer).project(x)
        weights = (q[0, head] @ k[0, head].T / 7**0.5).softmax(-1)
        for i in range(len(sequence)):
            for j in range(len(sequence)):
                p = float(weights[i, j])
                near += p * (abs(i - j) <= 2)
                sink += p * (abs(i - j) > 2 and j == 0)
                entropy -= p * np.log(p) if p else 0.0
    assert found.near[layer, head] == pytest.approx(near / tokens)
    assert found.sink[layer, head] == pytest.approx(sink / tokens)
    assert found.entropy[layer, head] == pytest.approx(entropy / tokens)
    np.testing.assert_allclose(found.near + found.sink + found.far, 1)
    assert (found.num_sequences, found.num_tokens) == (len(SEQUENCES), tokens)


def test_the_scorer_is_the_ridge_regression_of_what_is_read_from_afar() -> None:
    encoder = dense_encoder()
    heads = [[0, 2], [], [4]]
    blocks = list(encoder.stack.blocks)
    found = fit_scorers(blocks, encoder, SEQUENCES, LEVELS, heads=heads)
    rows, targets = [], []
    for sequence in SEQUENCES:
        x, _ = read_by(encoder, 0, sequence)
        with torch.no_grad():
            q, k, _ = attention_of(encoder, 0).project(x)
        weights = (q[0] @ k[0].transpose(1, 2) / 7**0.5).softmax(-1)[heads[0]]
        at = torch.arange(len(sequence))
        far = (at[:, None] - at).abs() > 2
        target = ((weights * far).sum(1).mean(0) + 1e-6).log()
        rows.append(x[0] - x[0].mean(0))
        targets.append(target - target.mean())
    features, target = torch.cat(rows), torch.cat(targets)
    square = features.T @ features
    wanted = torch.linalg.solve(square + 1e-2 * square.diagonal().mean() * torch.eye(DIM), features.T @ target)
    torch.testing.assert_close(found[0], wanted.float(), rtol=1e-4, atol=1e-6)
    # without heads there is nothing to foresee
    assert not found[1].any()


# limits


def test_a_window_over_everything_loses_nothing() -> None:
    found = profiled(dense_encoder(), some_scorers(), replace(LEVELS, window=47))
    assert found.error.shape == (LAYERS, HEADS, 3)
    assert found.error.max() < 1e-20
    np.testing.assert_allclose(found.near, 1)


def test_all_tokens_global_loses_nothing() -> None:
    found = profiled(dense_encoder(), some_scorers(), replace(LEVELS, num_global_tokens=23))
    assert found.error[..., 2].max() < 1e-12
    assert found.error[..., 0].min() > 1e-8


def test_the_levels_own_ratio_and_dense_below_do_not_matter() -> None:
    plain = profiled(dense_encoder(), some_scorers())
    other = profiled(dense_encoder(), some_scorers(), replace(LEVELS, ratio=LevelRatio(1, 0, 0), dense_below=999))
    np.testing.assert_array_equal(plain.error, other.error)


def test_hooks_are_gone_afterwards() -> None:
    encoder = dense_encoder()

    def broken(_given: Tensor) -> object:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        profile_heads(list(encoder.stack.blocks), broken, SEQUENCES, LEVELS, some_scorers())
    assert not any(module._forward_pre_hooks for module in encoder.modules())


# errors


def test_too_few_sequences_are_refused() -> None:
    encoder = dense_encoder()
    with pytest.raises(InputError, match="gives 3 sequences; at least 4"):
        fit_scorers(list(encoder.stack.blocks), encoder, SEQUENCES[:3], LEVELS)
    with pytest.raises(InputError, match="gives 3 sequences; at least 4"):
        profile_heads(list(encoder.stack.blocks), encoder, SEQUENCES[:3], LEVELS, some_scorers())


def test_blocks_with_different_heads_are_refused() -> None:
    config = EncoderConfig(vocab_size=29, dim=DIM, num_heads=(3, 2), head_dim=4, num_layers=2, levels=None)
    pruned = Encoder(config)
    with pytest.raises(ConfigError, match=r"the blocks have \[3, 2\] heads and as many in each are needed; convert"):
        profile_heads(list(pruned.stack.blocks), pruned, SEQUENCES, LEVELS, some_scorers())
