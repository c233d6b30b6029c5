from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compression.models import CASES, FFN, LEVELS, TOKENS, encoder, row_losses, square_loss, tokens
from trilevel.compression.importance import magnitude, prunable, prunable_blocks, random, taylor
from trilevel.errors import ConfigError, InputError, ShapeError
from trilevel.model.encoder import Encoder
from trilevel.model.stack import BlockStack

STEP = 1e-5


class Pair(nn.Module):
    """Two encoders and a stack beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = encoder(), encoder(num_heads=8)
        self.stack = BlockStack(20, 5, 1, None)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.first(ids), self.second(ids)], -1)


# definition


@torch.no_grad()
def slopes_of_scale(model: Encoder, weight: Tensor, columns: slice, batch: Tensor) -> Tensor:
    """Central difference of the loss of each row when these columns, so what they read, are scaled."""
    kept = weight[:, columns].clone()
    weight[:, columns] = (1 + STEP) * kept
    above = row_losses(model, batch)
    weight[:, columns] = (1 - STEP) * kept
    below = row_losses(model, batch)
    weight[:, columns] = kept
    return (above - below) / (2 * STEP)


@pytest.mark.parametrize("case", ["levels", "grouped_strict", "dense_heads", "gated", "post_norm"])
def test_taylor_is_the_squared_slope_of_a_gate_summed_over_examples(case: str) -> None:
    # the straight-through gradient of the scorers is no slope of the loss
    levels = replace(CASES[case].get("levels", LEVELS), selection_gradient="gate")
    model, batch = encoder(**(CASES[case] | {"levels": levels})), tokens()
    found = taylor(model, [batch], square_loss)
    for index, block in enumerate(prunable_blocks(model).values()):
        layer = block.attention
        width = layer.num_heads // layer.num_kv_heads * layer.head_dim
        sides = [
            (found.groups[index], layer.out_proj.weight, width),
            (found.channels[index], block.ffn.down.weight, 1),
        ]
        for scores, weight, size in sides:
            assert len(scores) * size == weight.shape[1]
            for unit, score in enumerate(scores):
                columns = slice(unit * size, (unit + 1) * size)
                slopes = slopes_of_scale(model, weight, columns, batch) / len(batch)
                torch.testing.assert_close(score, slopes.square().sum(), rtol=1e-4, atol=1e-12)


def test_taylor_of_a_linear_loss_is_the_squared_change_when_a_channel_is_removed() -> None:
    model, batch = encoder(has_final_norm=False), tokens(batch=1)
    direction = torch.randn(TOKENS, 20, dtype=torch.float64)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        value: Tensor = (model(batch) * direction).sum()
        return value

    scores = taylor(model, [batch], loss).channels[-1]
    with torch.no_grad():
        whole = loss(model, batch)
        for channel in range(FFN):
            without = copy.deepcopy(model)
            next(reversed(prunable_blocks(without).values())).ffn.down.weight[:, channel] = 0
            torch.testing.assert_close(scores[channel], (whole - loss(without, batch)).square())


@torch.no_grad()
def test_magnitude_is_the_norm_of_all_that_goes_with_a_unit() -> None:
    model = encoder(**CASES["grouped"], is_gated=True)
    found = magnitude(model)
    for index, block in enumerate(prunable_blocks(model).values()):
        layer, ffn = block.attention, block.ffn
        for group in range(6):
            total = 0.0
            for head in (2 * group, 2 * group + 1):
                rows = slice(6 * head, 6 * head + 6)
                total += float(
                    layer.in_proj.weight[rows].square().sum() + layer.out_proj.weight[:, rows].square().sum()
                )
            for first in (12 * 6, 18 * 6):
                total += float(layer.in_proj.weight[first + 6 * group : first + 6 * group + 6].square().sum())
            assert float(found.groups[index][group]) == pytest.approx(total**0.5)
        for channel in range(FFN):
            own = [ffn.up.weight[channel], ffn.up.weight[FFN + channel], ffn.down.weight[:, channel]]
            assert float(found.channels[index][channel]) == pytest.approx(float(torch.cat(own).norm()))


def test_random_is_a_function_of_the_seed() -> None:
    first, again, other = (random(encoder(), seed) for seed in (3, 3, 4))
    assert all(a.equal(b) for a, b in zip(first.groups + first.channels, again.groups + again.channels, strict=True))
    assert not any(a.equal(b) for a, b in zip(first.groups, other.groups, strict=True))
    assert [len(scores) for scores in (*first.groups, *first.channels)] == [6, 6, FFN, FFN]


# invariants


def test_taylor_adds_up_over_batches() -> None:
    model = encoder()
    batches = [tokens(seed=3), tokens(seed=4)]
    both = taylor(model, iter(batches), square_loss)
    one, other = (taylor(model, [batch], square_loss) for batch in batches)
    for total, a, b in zip(both.groups + both.channels, one.groups + one.channels, other.groups + other.channels,
                           strict=True):  # fmt: skip
        torch.testing.assert_close(total, a + b)


def test_an_encoder_called_twice_sees_two_examples() -> None:
    model = encoder()

    def twice(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return square_loss(model, pair[0]) + square_loss(model, pair[1])

    pair = (tokens(seed=3), tokens(seed=4))
    both, apart = taylor(model, [pair], twice), taylor(model, list(pair), square_loss)
    for own, wanted in zip(both.groups + both.channels, apart.groups + apart.channels, strict=True):
        torch.testing.assert_close(own, wanted)


def test_taylor_leaves_the_model_as_it_was() -> None:
    model = encoder(dropout=0.5)
    model.train()
    model.stack.blocks[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    first, again = (taylor(model, [tokens()], square_loss) for _ in range(2))
    # without dropout, so twice the same
    assert all(a.equal(b) for a, b in zip(first.channels, again.channels, strict=True))
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_weights_may_be_frozen_and_gradients_off() -> None:
    model = encoder()
    wanted = taylor(model, [tokens()], square_loss)
    with torch.no_grad():
        found = taylor(model.requires_grad_(False), [tokens()], square_loss)
    assert all(a.equal(b) for a, b in zip(found.groups, wanted.groups, strict=True))


def test_half_precision_ranks_as_double_does() -> None:
    model, batch = encoder(), tokens(batch=5)
    exact = taylor(model, [batch], square_loss)
    rough = taylor(copy.deepcopy(model).bfloat16(), [batch], square_loss)
    for a, b in zip(exact.channels, rough.channels, strict=True):
        assert int(a.argmax()) == int(b.argmax())


def test_every_encoder_is_found_and_the_stack_beside_it_is_not() -> None:
    model = Pair()
    assert list(prunable(model)) == ["first", "second"]
    assert [name.count("stack.blocks") for name in prunable_blocks(model)] == [1] * 4
    assert list(prunable_blocks(model))[2] == "second.stack.blocks.0"
    assert [len(scores) for scores in magnitude(model).groups] == [6, 6, 8, 8]


def test_a_model_without_encoder_gives_its_stacks() -> None:
    stack = BlockStack(20, 5, 1, None)
    assert list(prunable_blocks(stack)) == ["blocks.0"]
    assert list(prunable_blocks(nn.Sequential(nn.Linear(3, 5), stack))) == ["1.blocks.0"]


# error messages


def blind(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return square_loss(model, batch)


def own_distance(model: nn.Module, batch: Tensor) -> Tensor:
    output: Tensor = model(batch)
    return (output - output.detach()).square().mean()


def partly_blind(model: Any, batch: Tensor) -> Tensor:
    value: Tensor = model.stack.blocks[1](model.embedding(batch)).square().mean()
    return value


@pytest.mark.parametrize(
    ("batches", "loss", "error", "match"),
    [
        ([], square_loss, InputError, "'taylor' needs batches and there are none"),
        ([tokens()], lambda model, batch: model(batch).mean(1), ShapeError, r"shape \(3, 20\) and must be a scalar"),
        ([tokens()], lambda m, b: square_loss(m, b) / 0, InputError, "the loss of batch 1 is inf"),
        ([tokens()], blind, ConfigError, "the loss has no gradient; compute it from the model's output"),
        ([tokens()], own_distance, ConfigError, "every gradient of the loss is zero, as that of the distance to"),
        ([tokens()], partly_blind, ConfigError, "no gradient in stack.blocks.0; it must be computed from"),
    ],
)
def test_wrong_losses_are_named(batches: Any, loss: Any, error: type[Exception], match: str) -> None:
    model = encoder()
    with pytest.raises(error, match=match):
        taylor(model, batches, loss)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_models_that_cannot_be_pruned_are_named() -> None:
    with pytest.raises(ConfigError, match="Linear holds no Encoder and no BlockStack"):
        magnitude(nn.Linear(3, 5))
    model = encoder()
    block = next(iter(prunable_blocks(model).values()))
    block.ffn.down = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"blocks.0.ffn.down is a Identity and pruning slices a Linear; prune first"):
        magnitude(model)
    block.attention = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"blocks.0.attention is a Identity and pruning slices a MultiLevelAttention"):
        magnitude(model)
