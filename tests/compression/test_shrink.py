from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compression.models import CASES, FFN, TOKENS, encoder, tokens
from trilevel.compression.importance import prunable_blocks
from trilevel.compression.keep import Kept, class_groups
from trilevel.compression.shrink import prune_encoder, prune_stack
from trilevel.errors import ConfigError
from trilevel.model.encoder import Encoder
from trilevel.model.stack import BlockStack


def some(model: Encoder) -> Kept:
    """The last but one of each class where there are two, other numbers in other blocks; odd channels, even ones."""
    groups, channels = [], []
    for index, block in enumerate(prunable_blocks(model).values()):
        own: list[int] = []
        for members in class_groups(block.attention).values():
            left_out = {members[-2]} if len(members) > 1 else set()
            left_out |= {members[0]} if len(members) > 2 and index else set()
            own += [group for group in members if group not in left_out]
        groups.append(tuple(own))
        channels.append(tuple(range(1 - index, block.ffn.down.in_features, 2 + index)))
    return Kept(groups=tuple(groups), channels=tuple(channels))


def zeroed(model: Encoder, kept: Kept) -> Encoder:
    """The same sizes; nothing reads what is not kept."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for block, groups, channels in zip(prunable_blocks(twin).values(), kept.groups, kept.channels, strict=True):
            layer = block.attention
            per_group = layer.num_heads // layer.num_kv_heads
            for head in range(layer.num_heads):
                if head // per_group not in groups:
                    layer.out_proj.weight[:, head * layer.head_dim : (head + 1) * layer.head_dim] = 0
            for channel in range(block.ffn.down.in_features):
                if channel not in channels:
                    block.ffn.down.weight[:, channel] = 0
    return twin


def masks() -> dict[str, Tensor]:
    padding = torch.zeros(3, TOKENS, dtype=torch.bool)
    padding[1, 11:] = True
    return {"padding_mask": padding}


# definition


@pytest.mark.parametrize("case", CASES)
def test_a_pruned_encoder_is_the_encoder_with_the_rest_zeroed(case: str) -> None:
    model = encoder(**CASES[case])
    kept = some(model)
    small, ids = prune_encoder(model, kept), tokens()
    torch.testing.assert_close(small(ids, **masks()), zeroed(model, kept)(ids, **masks()), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(small(ids, **masks()), model(ids, **masks()), rtol=1e-3)
    # without gradients the feed-forward parts and the kernels run another way
    with torch.no_grad():
        torch.testing.assert_close(small(ids), zeroed(model, kept)(ids), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_its_configuration_builds_it_anew(case: str) -> None:
    model = encoder(**CASES[case])
    small = prune_encoder(model, some(model))
    config = type(small.config).from_dict(small.config.to_dict())
    assert config == small.config
    again = Encoder(config).double().eval()
    again.load_state_dict(small.state_dict())
    torch.testing.assert_close(again(tokens()), small(tokens()))


@pytest.mark.parametrize("case", CASES)
def test_matrices_are_as_small_as_what_is_kept(case: str) -> None:
    model = encoder(**CASES[case])
    kept = some(model)
    blocks = prunable_blocks(prune_encoder(model, kept)).values()
    for old, new, groups, channels in zip(
        prunable_blocks(model).values(), blocks, kept.groups, kept.channels, strict=True
    ):
        per_group = old.attention.num_heads // old.attention.num_kv_heads
        heads = per_group * len(groups)
        assert new.attention.in_proj.weight.shape == (6 * (heads + 2 * len(groups)), 20)
        assert new.attention.out_proj.weight.shape == (20, 6 * heads)
        assert new.ffn.up.weight.shape == (len(channels) * (2 if old.ffn.is_gated else 1), 20)
        assert new.ffn.down.weight.shape == (20, len(channels))
        wanted = [len([g for g in groups if g in own]) for own in class_groups(old.attention).values()]
        assert [len(own) for own in class_groups(new.attention).values()] == wanted
        assert new.attention.cost(2, 97).flops < old.attention.cost(2, 97).flops


def test_in_float32_the_kernels_take_a_pruned_layer() -> None:
    model = encoder(**CASES["grouped_dense_heads"]).float()
    kept = some(model)
    with torch.no_grad():
        found, wanted = (part(tokens()) for part in (prune_encoder(model, kept), zeroed(model, kept)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_pruned_causal_layer_decodes_step_by_step() -> None:
    model = encoder(is_causal=True)
    layer = next(iter(prunable_blocks(prune_encoder(model, some(model))).values())).attention
    x = torch.randn(2, TOKENS, 20, dtype=torch.float64)
    cache = layer.new_cache(2)
    steps = [layer.step(x[:, place : place + 1], cache) for place in range(TOKENS)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=1e-9, atol=1e-9)


# limits


@pytest.mark.parametrize("case", CASES)
def test_keeping_everything_changes_nothing(case: str) -> None:
    model = encoder(**CASES[case])
    blocks = prunable_blocks(model).values()
    kept = Kept(
        groups=tuple(tuple(range(block.attention.num_kv_heads)) for block in blocks),
        channels=tuple(tuple(range(block.ffn.down.in_features)) for block in blocks),
    )
    small = prune_encoder(model, kept)
    assert small.config == model.config
    assert small(tokens()).equal(model(tokens()))


def test_pruning_twice_is_pruning_once() -> None:
    model = encoder(num_heads=12)
    first = Kept(groups=((0, 2, 3, 5, 6, 8, 9, 10, 11),) * 2, channels=(tuple(range(1, 12)),) * 2)
    second = Kept(groups=((0, 3, 4, 8),) * 2, channels=((0, 5, 7),) * 2)
    once = Kept(groups=((0, 5, 6, 11),) * 2, channels=((1, 6, 8),) * 2)
    twice = prune_encoder(prune_encoder(model, first), second)
    torch.testing.assert_close(twice(tokens()), prune_encoder(model, once)(tokens()))
    # 6:4:2 heads at first, 2:1:1 now
    levels = twice.config.levels
    assert not isinstance(levels, tuple)
    assert levels is not None
    assert levels.ratio.split(4) == (2, 1, 1)


# invariants


def test_the_encoder_is_left_as_it_was_and_shares_nothing() -> None:
    model = encoder(**CASES["dense_heads"])
    state, config = copy.deepcopy(model.state_dict()), model.config
    small = prune_encoder(model, some(model))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert model.config is config


def test_type_mode_and_what_learns_stay() -> None:
    model = encoder(**CASES["levels"]).bfloat16().train()
    model.embedding.requires_grad_(False)
    model.stack.blocks[0].ffn.requires_grad_(False)
    small = prune_encoder(model, some(model))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert all(part.training for part in small.modules())
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert [name for name, parameter in small.named_parameters() if not parameter.requires_grad] == frozen


def test_it_draws_no_random_numbers() -> None:
    model = encoder()
    state = torch.get_rng_state()
    prune_encoder(model, some(model))
    assert torch.get_rng_state().equal(state)


def test_every_weight_of_a_pruned_encoder_learns() -> None:
    model = encoder(**CASES["strict"])
    small = prune_encoder(model, some(model))
    small(tokens()).square().sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name


def test_a_stack_is_pruned_alone() -> None:
    stack = BlockStack(20, 5, 2, None, rope_theta=None).double()
    kept = Kept(groups=((1, 3), (0,)), channels=((5, 7, 11), (2,)))
    x = torch.randn(2, 7, 20, dtype=torch.float64)
    small = prune_stack(stack, kept)
    assert small(x).shape == x.shape
    assert [block.attention.num_heads for block in prunable_blocks(small).values()] == [2, 1]
    assert [block.attention.num_heads for block in prunable_blocks(stack).values()] == [5, 5]


def test_the_ratio_changes_only_where_it_must() -> None:
    model = encoder()
    halves = Kept(groups=((0, 1, 3, 5), (0, 3, 4, 5)), channels=(tuple(range(FFN)),) * 2)
    levels = prune_encoder(model, halves).config.levels
    assert isinstance(levels, tuple)
    old = model.config.levels
    assert not isinstance(old, tuple)
    assert old is not None
    # 3:2:1 gives 2:1:1 of four heads
    assert levels[0] == old
    assert levels[1] is not None
    assert levels[1].ratio.shares == (1, 2, 1)
    assert dataclasses.replace(levels[1], ratio=old.ratio) == old


# error messages

WHOLE = tuple(range(6))


@pytest.mark.parametrize(
    ("groups", "channels", "match"),
    [
        ((WHOLE,), ((0,), (0,)), "groups of 1 and channels of 2 blocks, and the model 2 blocks"),
        ((WHOLE, ()), ((0,), (0,)), r"blocks.1: groups=\[\] must be one or more ascending indices of 0 to 5"),
        ((WHOLE, (0, 3, 6)), ((0,), (0,)), r"blocks.1: groups=\[0, 3, 6\] must be one or more"),
        ((WHOLE, (3, 0, 5)), ((0,), (0,)), r"groups=\[3, 0, 5\] must be one or more ascending"),
        ((WHOLE, WHOLE), ((0,), (-1, 2)), r"blocks.1: channels=\[-1, 2\] must be one or more ascending indices of 0"),
        ((WHOLE, WHOLE), ((0, 0), (1,)), r"blocks.0: channels=\[0, 0\] must be one or more"),
        ((WHOLE, (0, 1, 5)), ((0,), (0,)), "leave no regional head of groups 3 to 4; keep at least one of each"),
    ],
)
def test_what_cannot_be_kept_is_named(groups: Any, channels: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        prune_encoder(encoder(), Kept(groups=groups, channels=channels))
