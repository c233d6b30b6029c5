from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trilevel.errors import ConfigError, ShapeError
from trilevel.model.embed import TokenEmbedding
from trilevel.model.patches import PatchEmbedding, Patches
from trilevel.model.positions import places_in_segments, places_of_real_tokens

VOCAB, DIM, BATCH, TOKENS = 23, 6, 3, 13
PATCHES = Patches(image_size=(6, 15), patch_size=(2, 5), num_channels=4, num_extra_tokens=2)


def sharpened(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module.eval()


# tokens


def test_embedding_is_the_sum_of_its_tables() -> None:
    norm = nn.LayerNorm(DIM, eps=0.1)
    part = sharpened(TokenEmbedding(VOCAB, DIM, num_positions=5, num_token_types=3, norm=norm))
    ids, types = torch.randint(0, VOCAB, (BATCH, TOKENS)), torch.randint(0, 3, (BATCH, TOKENS))
    positions = torch.randint(0, 31, (BATCH, TOKENS))
    for row in range(BATCH):
        for column in range(TOKENS):
            total = (
                part.table.weight[ids[row, column]]
                + part.token_types.weight[types[row, column]]
                + part.positions.weight[positions[row, column] % 5]
            )
            wanted = F.layer_norm(total, (DIM,), norm.weight, norm.bias, 0.1)
            found = part(ids, positions=positions, token_type_ids=types)[row, column]
            torch.testing.assert_close(found, wanted)


def test_defaults_are_type_0_and_the_places() -> None:
    part = sharpened(TokenEmbedding(VOCAB, DIM, num_positions=5, num_token_types=3))
    ids = torch.randint(0, VOCAB, (BATCH, TOKENS))
    whole = part(ids, positions=torch.arange(TOKENS)[None], token_type_ids=torch.zeros_like(ids))
    torch.testing.assert_close(part(ids), whole)


def test_plain_embedding_is_the_table() -> None:
    part = TokenEmbedding(VOCAB, DIM)
    ids = torch.randint(0, VOCAB, (BATCH, TOKENS))
    assert set(part.state_dict()) == {"table.weight"}
    torch.testing.assert_close(part(ids), part.table.weight[ids], rtol=0, atol=0)


def test_token_messages() -> None:
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    with pytest.raises(ConfigError, match="the model has no token types; leave token_type_ids out or set num_token"):
        TokenEmbedding(VOCAB, DIM)(ids, token_type_ids=ids)
    with pytest.raises(ShapeError, match=r"token_type_ids has shape \(3, 12\); that of input_ids, \(3, 13\)"):
        TokenEmbedding(VOCAB, DIM, num_token_types=2)(ids, token_type_ids=ids[:, 1:])


# positions


def test_places_of_real_tokens_are_counted_one_by_one() -> None:
    padding = torch.rand(7, 29) < 0.4
    segments = (torch.rand(7, 29) < 0.2).long().cumsum(dim=1)
    alone, packed = places_of_real_tokens(padding), places_of_real_tokens(padding, segments)
    for row in range(7):
        for column in range(29):
            real = ~padding[row, :column]
            assert alone[row, column] == real.sum()
            assert packed[row, column] == (real & (segments[row, :column] == segments[row, column])).sum()


def test_places_without_padding_are_those_of_the_segments() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 4], [2, 2, 2, 2, 2, 2]])
    none = torch.zeros_like(segments, dtype=torch.bool)
    assert torch.equal(places_of_real_tokens(none, segments), places_in_segments(segments))


# images


def test_patches_are_cut_row_by_row() -> None:
    part = sharpened(PatchEmbedding(PATCHES, DIM)).double()
    pixels = torch.randn(BATCH, 4, 6, 15, dtype=torch.float64)
    found = part(pixels)
    assert found.shape == (BATCH, PATCHES.num_tokens, DIM)
    assert PATCHES.grid == (3, 3)
    for extra in range(2):
        wanted = part.extra_tokens.weight[extra] + part.positions.weight[extra]
        torch.testing.assert_close(found[:, extra], wanted.expand(BATCH, -1))
    for row in range(3):
        for column in range(3):
            patch = pixels[:, :, 2 * row : 2 * row + 2, 5 * column : 5 * column + 5].flatten(1)
            place = 2 + 3 * row + column
            wanted = F.linear(patch, part.projection.weight.flatten(1), part.projection.bias)
            torch.testing.assert_close(found[:, place], wanted + part.positions.weight[place])


def test_patches_may_be_normalised() -> None:
    norm = nn.LayerNorm(DIM)
    part = sharpened(PatchEmbedding(PATCHES, DIM, norm=norm))
    pixels = torch.randn(1, 4, 6, 15)
    after = part(pixels)
    part.norm = None
    torch.testing.assert_close(after, norm(part(pixels)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_size": (6, 0)}, r"image_size=\(6, 0\) must be \(height, width\), both >= 1"),
        ({"image_size": 6}, r"image_size=6 must be \(height, width\)"),
        ({"patch_size": (2, 5, 3)}, r"patch_size=\(2, 5, 3\) must be \(height, width\)"),
        ({"patch_size": (4, 5)}, r"patch_size=\(4, 5\) does not divide image_size=\(6, 15\); crop or resize"),
        ({"num_channels": 0}, "num_channels=0 must be >= 1"),
        ({"num_extra_tokens": -1}, "num_extra_tokens=-1 >= 0"),
    ],
)
def test_patch_messages(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(PATCHES, **change)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 6, 15),
        torch.zeros(1, 4, 15, 6),
        torch.zeros(4, 6, 15),
        torch.zeros(1, 4, 6, 15, dtype=torch.uint8),
    ],
)
def test_image_messages(pixels: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"\(batch, 4, 6, 15\) are needed\. Resize and normalise the images"):
        PatchEmbedding(PATCHES, DIM)(pixels)
