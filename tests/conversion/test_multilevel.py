"""Heads moved into the order of their classes."""

from __future__ import annotations

import numpy as np
import torch

from tests.conversion.dense import DIM, HEADS, LAYERS, attention_of, dense_encoder, ids
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion.assign import HeadClass
from trilevel.conversion.multilevel import convertible, with_classes
from trilevel.model.encoder import Encoder, with_levels

LEVELS = Levels(window=5, region_size=3, num_global_tokens=4)
CLASSES = np.array([[2, 0, 1, 0, 3], [3, 3, 3, 3, 3], [1, 1, 2, 0, 2]])
SCORERS = [torch.randn(DIM, generator=torch.Generator().manual_seed(seed)) for seed in range(LAYERS)]


def output(encoder: Encoder, tokens: int = 23) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = encoder(ids((tokens,))[0][None])
    return hidden


def test_a_window_over_everything_is_the_original_whatever_the_classes() -> None:
    dense = dense_encoder()
    converted = with_classes(dense, CLASSES, Levels(window=47, region_size=3, num_global_tokens=4), SCORERS)
    assert not converted.training
    torch.testing.assert_close(output(converted), output(dense), rtol=1e-9, atol=1e-9)


def test_each_head_keeps_its_own_weights_under_its_class() -> None:
    dense = dense_encoder()
    attention = attention_of(with_classes(dense, CLASSES, LEVELS, SCORERS), 0)
    original = attention_of(dense, 0)
    order = [1, 3, 2, 0, 4]
    x = torch.randn(1, 19, DIM, dtype=torch.float64)
    for ours, theirs in zip(attention.project(x), original.project(x), strict=True):
        torch.testing.assert_close(ours, theirs[:, order])
    assert attention.levels is not None
    assert attention.levels.ratio == LevelRatio(2, 1, 1)
    assert attention.head_split == (2, 1, 1)
    assert attention.num_dense_heads == 1
    torch.testing.assert_close(attention.scorer.weight[0], SCORERS[0].double())
    slices = original.out_proj.weight.unflatten(1, (HEADS, 7))
    torch.testing.assert_close(attention.out_proj.weight, slices[:, order].flatten(1))


def test_a_layer_of_dense_heads_stays_dense() -> None:
    converted = with_classes(dense_encoder(), CLASSES, LEVELS, SCORERS)
    assert attention_of(converted, 1).levels is None
    assert converted.config.num_dense_heads == (1, 0, 0)
    # the rest of the last layer: no dense head, one local
    assert attention_of(converted, 2).head_split == (1, 2, 2)


def test_the_original_is_left_alone() -> None:
    dense = dense_encoder()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with_classes(dense, CLASSES, LEVELS, SCORERS)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_levels_and_pooling_change_what_is_computed() -> None:
    dense = dense_encoder()
    converted = with_classes(dense, CLASSES, LEVELS, SCORERS)
    assert (output(converted) - output(dense)).abs().max() > 1e-3
    pool = attention_of(converted, 0).pool_weight
    assert pool is not None
    assert not pool.any()


def test_blocks_that_have_levels_are_passed_over() -> None:
    sliding = Levels(ratio=LevelRatio(1, 0, 0), mode="strict", window=7)
    mixed = with_levels(dense_encoder(), (None, sliding, None))
    assert convertible(mixed) == [0, 2]
    converted = with_classes(mixed, CLASSES[[0, 2]], LEVELS, [SCORERS[0], SCORERS[2]])
    assert attention_of(converted, 1).levels == sliding
    assert attention_of(converted, 2).head_split == (1, 2, 2)
    assert HeadClass.DENSE not in CLASSES[2]
