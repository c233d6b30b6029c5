"""Layer dropout: which blocks are left out for which rows, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trilevel.training.dropout import layer_dropout


class Plus(nn.Module):
    """Adds a power of two, so that a sum tells which blocks ran."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        del padding_mask
        return x + float(2**self.place)


def ran(blocks: nn.ModuleList, rows: int) -> Tensor:
    """(rows, blocks), whether each block ran for each row."""
    x = torch.zeros(rows, 3, 2)
    for block in blocks:
        x = block(x, padding_mask=None)
    assert (x == x[:, :1, :1]).all()
    bits: Tensor = x[:, 0, :1].long() >> torch.arange(len(blocks))
    return bits % 2 == 1


def test_later_blocks_are_left_out_more_often_for_rows_of_their_own() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Plus(place) for place in range(3)).train()
    with layer_dropout(blocks, 0.4):
        found = ran(blocks, 4_000)
    assert found.float().mean(0).tolist() == pytest.approx([1.0, 0.8, 0.6], abs=0.03)
    # independent of each other
    assert (found[:, 1] & found[:, 2]).float().mean().item() == pytest.approx(0.48, abs=0.03)


def test_nothing_is_left_out_afterwards_in_evaluation_or_without_a_chance() -> None:
    blocks = nn.ModuleList(Plus(place) for place in range(3)).train()
    with layer_dropout(blocks, 0.0):
        assert ran(blocks, 100).all()
    with layer_dropout(blocks, 0.9):
        assert not ran(blocks, 100).all()
        assert ran(blocks.eval(), 100).all()
    assert ran(blocks.train(), 100).all()


def test_a_single_block_always_runs() -> None:
    blocks = nn.ModuleList([Plus(0)]).train()
    with layer_dropout(blocks, 0.9):
        assert ran(blocks, 100).all()
