from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.compression.models import CASES, LEVELS, encoder
from trilevel.attention.levels import LevelRatio
from trilevel.compression.importance import Importance, prunable_blocks
from trilevel.compression.keep import Kept, Scope, choose, class_groups
from trilevel.errors import ConfigError
from trilevel.model.block import Block

ALL: dict[str, Any] = {"keep_heads": 1.0, "keep_ffn": 1.0, "scope": "layer", "multiple": 1}


def blocks(**changes: Any) -> list[Block]:
    return list(prunable_blocks(encoder(**changes)).values())


def scored(groups: list[list[float]], channels: list[list[float]]) -> Importance:
    def tensors(rows: list[list[float]]) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(row, dtype=torch.float64) for row in rows)

    return Importance(groups=tensors(groups), channels=tensors(channels))


FLAT = [[1.0] * 13] * 2


# definition


def test_classes_are_those_of_the_layer() -> None:
    of_case = {name: class_groups(blocks(**CASES[name])[0].attention) for name in CASES}
    assert of_case["levels"] == {"local": range(3), "regional": range(3, 5), "global": range(5, 6)}
    assert of_case["grouped"] == of_case["levels"]
    assert of_case["union"] == {"local": range(5), "global": range(5, 6)}
    assert of_case["dense_heads"] == of_case["levels"] | {"dense": range(6, 8)}
    assert of_case["grouped_dense_heads"] == of_case["levels"] | {"dense": range(6, 8)}
    assert of_case["dense"] == {"dense": range(5)}


def test_each_class_keeps_its_share_and_its_best() -> None:
    groups = [[1.0, 3.0, 2.0, 9.0, 4.0, 0.0], [9.0, 7.0, 8.0, 5.0, 4.0, 6.0]]
    kept = choose(blocks(), scored(groups, FLAT), **(ALL | {"keep_heads": 4 / 6}))
    # 3:2:1 over 4: 2, 1.33 and 0.67, so 2:1:1
    assert kept.groups == ((1, 2, 3, 5), (0, 2, 3, 5))
    assert kept.channels == (tuple(range(13)),) * 2


def test_one_head_of_each_class_stays_whatever_the_fraction() -> None:
    groups = [[1.0, 3.0, 2.0, 9.0, 4.0, 0.0]] * 2
    for scope in ("layer", "global"):
        kept = choose(blocks(), scored(groups, FLAT), **(ALL | {"keep_heads": 0.01, "scope": scope}))
        assert kept.groups == ((1, 3, 5), (1, 3, 5))


def test_globally_blocks_compete_by_scores_made_comparable() -> None:
    # the second block's scores are a thousandth of the first's and more even: it keeps more
    groups = [[9.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.005, 0.004, 0.005, 0.004, 0.005, 0.004]]
    own = ALL | {"keep_heads": 8 / 12, "scope": "global"}
    kept = choose(blocks(), scored(groups, FLAT), **own)
    assert [len(row) for row in kept.groups] == [3, 5]
    kept = choose(blocks(), scored(groups, FLAT), **(own | {"scope": "layer"}))
    assert [len(row) for row in kept.groups] == [4, 4]


def test_channels_are_kept_in_whole_steps() -> None:
    channels = [[float(score) for score in range(13)], [1.0] * 4 + [0.0] * 9]
    importance = scored([[1.0] * 6] * 2, channels)
    kept = choose(blocks(), importance, **(ALL | {"keep_ffn": 0.5, "multiple": 4}))
    # 6.5 of 13 are 1.625 steps of 4
    assert kept.channels == (tuple(range(5, 13)), (0, 1, 2, 3, 4, 5, 6, 7))
    kept = choose(blocks(), importance, **(ALL | {"keep_ffn": 0.5, "multiple": 4, "scope": "global"}))
    # 13 of 26 are 3 steps; means over the root mean square: 1.49, 0.92, 0.35 and 1.80, 0, 0
    assert kept.channels == (tuple(range(5, 13)), (0, 1, 2, 3))


def test_a_block_without_importance_keeps_its_least() -> None:
    channels = [[0.0] * 13, [1.0] * 13]
    own = ALL | {"keep_ffn": 0.5, "scope": "global"}
    kept = choose(blocks(), scored([[0.0] * 6] * 2, channels), **own)
    assert [len(row) for row in kept.channels] == [1, 12]


# invariants


def totals(kept: Kept) -> tuple[int, int]:
    return sum(map(len, kept.groups)), sum(map(len, kept.channels))


BLOCKS = {name: blocks(**CASES[name]) for name in ("levels", "dense_heads", "dense", "own_sizes")}


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(BLOCKS)),
    keep_heads=st.floats(0.01, 1.0),
    keep_ffn=st.floats(0.01, 1.0),
    scope=st.sampled_from(["global", "layer"]),
    multiple=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_what_is_kept_is_what_was_asked_for(
    name: str, keep_heads: float, keep_ffn: float, scope: Scope, multiple: int, seed: int
) -> None:
    own = BLOCKS[name]
    generator = torch.Generator().manual_seed(seed)
    sizes = [(block.attention.num_kv_heads, block.ffn.down.in_features) for block in own]
    importance = Importance(
        groups=tuple(torch.rand(heads, generator=generator).double() for heads, _ in sizes),
        channels=tuple(torch.rand(width, generator=generator).double() for _, width in sizes),
    )
    kept = choose(own, importance, keep_heads=keep_heads, keep_ffn=keep_ffn, scope=scope, multiple=multiple)
    least = 0
    for block, groups, channels in zip(own, kept.groups, kept.channels, strict=True):
        assert list(groups) == sorted(set(groups))
        assert list(channels) == sorted(set(channels))
        assert keep_ffn == 1.0 or (channels and len(channels) % multiple == 0)
        classes = class_groups(block.attention)
        least += len(classes)
        for members in classes.values():
            there = [group for group in groups if group in members]
            assert there
            # in proportion, to less than one head but for the one that each class has
            share = len(groups) * len(members) / block.attention.num_kv_heads
            assert len(there) < share + 1
    if scope == "global":
        heads, widths = (sum(size[place] for size in sizes) for place in (0, 1))
        assert totals(kept)[0] == max(least, int(keep_heads * heads + 0.5))
        most = sum(width // multiple * multiple for _, width in sizes)
        wanted = multiple * int(keep_ffn * widths / multiple + 0.5)
        assert keep_ffn == 1.0 or totals(kept)[1] == min(most, max(wanted, multiple * len(own)))


def test_the_ratio_of_a_layer_stays() -> None:
    levels = replace(LEVELS, ratio=LevelRatio(6, 3, 1))
    own = blocks(levels=levels, num_heads=20)
    importance = scored([[float(score) for score in range(20)]] * 2, FLAT)
    kept = choose(own, importance, **(ALL | {"keep_heads": 0.5}))
    classes = class_groups(own[0].attention)
    counts = [sum(group in members for group in kept.groups[0]) for members in classes.values()]
    assert counts == list(levels.ratio.split(10))


# error messages


def test_too_large_a_multiple_is_named() -> None:
    importance = scored([[1.0] * 6] * 2, FLAT)
    with pytest.raises(ConfigError, match=r"multiple=16 is more than the 13 channels of a block; use a smaller"):
        choose(blocks(), importance, **(ALL | {"keep_ffn": 0.5, "multiple": 16}))
