"""Orders of a grid: permutations, whose stretches are compact; and images through them."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder, with_levels
from trilevel.model.grid_order import cells_in_order, hilbert_path
from trilevel.model.patches import PatchEmbedding, Patches
from trilevel.model.weights import copy_shared

sides = st.integers(1, 23)

# definition


@given(sides, sides)
def test_the_curve_visits_each_cell_and_steps_to_neighbours(rows: int, columns: int) -> None:
    path = hilbert_path(rows, columns)
    assert sorted(path) == [(row, column) for row in range(rows) for column in range(columns)]
    steps = [(abs(a - c), abs(b - d)) for (a, b), (c, d) in pairwise(path)]
    assert all(max(step) == 1 for step in steps)
    num_diagonal = sum(step == (1, 1) for step in steps)
    assert num_diagonal <= (max(rows, columns) % 2 == 1 and min(rows, columns) % 2 == 0)


def test_on_powers_of_two_it_is_hilberts() -> None:
    path = hilbert_path(8, 8)
    # every aligned stretch of 4^k cells is a square
    for size, side in ((4, 2), (16, 4)):
        for start in range(0, 64, size):
            assert len({(row // side, column // side) for row, column in path[start : start + size]}) == 1


@given(sides, sides, st.integers(1, 5), st.integers(1, 7))
def test_consecutive_cells_are_a_tile(tile_rows: int, tile_columns: int, height: int, width: int) -> None:
    rows, columns = tile_rows * height, tile_columns * width
    order = cells_in_order((rows, columns), "tiles", (height, width))
    assert sorted(order) == list(range(rows * columns))
    before: tuple[int, int] | None = None
    for start in range(0, len(order), height * width):
        cells = [divmod(cell, columns) for cell in order[start : start + height * width]]
        found = {(row // height, column // width) for row, column in cells}
        assert len(found) == 1
        # within a tile row by row; the next tile is a neighbour
        assert cells == sorted(cells)
        tile = found.pop()
        assert before is None or max(abs(tile[0] - before[0]), abs(tile[1] - before[1])) == 1
        before = tile


# images

PATCHES = Patches(image_size=(12, 28), patch_size=(2, 2), num_channels=1, num_extra_tokens=1)
ORDERED: list[dict[str, Any]] = [{"order": "hilbert"}, {"order": "tiles", "tile": (3, 7)}]


def config(patches: Patches, levels: Levels | None = None) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=None, dim=24, num_heads=3, num_layers=2, levels=levels, rope_theta=None, patches=patches
    )


@pytest.mark.parametrize("change", ORDERED)
def test_tokens_are_those_of_rows_in_another_order(change: dict[str, Any]) -> None:
    patches = dataclasses.replace(PATCHES, **change)
    plain, part = PatchEmbedding(PATCHES, 5), PatchEmbedding(patches, 5)
    copied = copy_shared(plain, part)
    assert not copied.only_in_source + copied.only_in_target
    pixels = torch.randn(3, 1, 12, 28)
    order = patches.token_order()
    assert (sorted(order), order[0]) == (list(range(85)), 0)
    torch.testing.assert_close(part(pixels), plain(pixels)[:, order], rtol=0, atol=0)


@pytest.mark.parametrize("change", ORDERED)
def test_dense_attention_does_not_see_the_order(change: dict[str, Any]) -> None:
    plain = Encoder(config(PATCHES)).double().eval()
    patches = dataclasses.replace(PATCHES, **change)
    other = Encoder(config(patches)).double().eval()
    copy_shared(plain, other)
    pixels = torch.randn(2, 1, 12, 28, dtype=torch.float64)
    wanted = plain(pixels)
    torch.testing.assert_close(other(pixels), wanted[:, patches.token_order()])
    torch.testing.assert_close(other(pixels).mean(1), wanted.mean(1))


def test_local_heads_see_the_neighbourhood_of_a_tile() -> None:
    levels = Levels(ratio=LevelRatio(1, 0, 0), window=9, region_size=4)
    patches = dataclasses.replace(PATCHES, num_extra_tokens=0, order="tiles", tile=(2, 2))
    tiled = with_levels(Encoder(config(patches)), levels).double().eval()
    rows = with_levels(Encoder(config(dataclasses.replace(patches, order="rows", tile=None))), levels).double().eval()
    copy_shared(tiled, rows)
    pixels = torch.randn(2, 1, 12, 28, dtype=torch.float64)
    difference = (tiled(pixels) - rows(pixels)[:, patches.token_order()]).abs().max()
    assert difference > 1e-4


def test_the_order_survives_json() -> None:
    for change in ({}, *ORDERED):
        one = config(dataclasses.replace(PATCHES, **change))
        assert EncoderConfig.from_dict(one.to_dict()) == one
    old = config(PATCHES).to_dict()
    # written before there were orders
    for name in ("order", "tile"):
        del old["patches"][name]
    assert EncoderConfig.from_dict(old) == config(PATCHES)


# messages


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"order": "spiral"}, "order='spiral' is unknown; known are rows, tiles, hilbert"),
        ({"order": "tiles"}, r"order='tiles' and tile=None; order='tiles' needs a tile \(rows, columns\)"),
        ({"tile": (2, 2)}, r"order='rows' and tile=\(2, 2\)"),
        ({"order": "tiles", "tile": (4, 2)}, r"tile=\(4, 2\) does not divide the grid of 6 x 14 .* order='hilbert'"),
        ({"order": "tiles", "tile": 2}, r"tile=2 must be \(rows, columns\)"),
        ({"order": "tiles", "tile": (0, 2)}, r"tile=\(0, 2\) must be"),
    ],
)
def test_messages(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(PATCHES, **change)
