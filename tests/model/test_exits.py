"""Heads behind inner blocks, and a classifier run by segments."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from trilevel.applications.classification.model import Classifier, ClassifierConfig
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig
from trilevel.model.exits import even_exits, run_segment, run_segments
from trilevel.model.focus import Focus

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=3, num_global_tokens=2)
CONFIG = ClassifierConfig(
    encoder=EncoderConfig(vocab_size=31, dim=18, num_heads=3, num_layers=5, levels=LEVELS, max_tokens=64),
    labels=("a", "b", "c", "d"),
    max_tokens=64,
    exits=(2, 3),
)


def make(**changes: Any) -> Any:
    model = Classifier(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    padding = torch.zeros(3, 17, dtype=torch.bool)
    padding[1, 11:] = True
    return torch.randint(1, 31, (3, 17)), padding


# definition


def test_a_head_reads_the_mean_of_the_real_tokens_behind_its_block() -> None:
    model, (ids, padding) = make(), inputs()
    hidden, said = model.embed(ids, padding), []
    with torch.no_grad():
        for number, block in enumerate(model.encoder.stack.blocks, 1):
            hidden = block(hidden, padding_mask=padding)
            if number in CONFIG.exits:
                head = model.exits[CONFIG.exits.index(number)]
                for row in range(3):
                    real = hidden[row, ~padding[row]]
                    normed = F.layer_norm(real, (18,), head.norm.weight, head.norm.bias, head.norm.eps)
                    said.append(F.linear(normed.mean(0), head.head.logits.weight, head.head.logits.bias))
        found = model(ids, padding_mask=padding, return_exits=True)
    assert found.shape == (3, 3, 4)
    torch.testing.assert_close(found[:, :2], torch.stack(said).view(2, 3, 4).transpose(0, 1))
    torch.testing.assert_close(found[:, 2], model(ids, padding_mask=padding))


# invariants


def test_segments_one_by_one_are_all_of_them() -> None:
    model, (ids, padding) = make(), inputs()
    with torch.no_grad():
        hidden = model.embed(ids, padding)
        last, wanted = run_segments(model, hidden, padding)
        for segment in range(3):
            hidden, logits = run_segment(model, segment, hidden, padding)
            assert torch.equal(logits, wanted[:, segment])
    assert torch.equal(hidden, last)


def test_heads_learn_and_the_answer_does_not_know_of_them() -> None:
    model, (ids, padding) = make().train(), inputs()
    model(ids, padding_mask=padding, return_exits=True)[:, 0].sum().backward()
    assert model.exits[0].head.logits.weight.grad.any()
    assert not model.exits[1].head.logits.weight.grad.any()
    without = make(exits=())
    without.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("exits")})
    torch.testing.assert_close(without(ids, padding_mask=padding), model.eval()(ids, padding_mask=padding))
    assert without(ids, padding_mask=padding, return_exits=True).shape == (3, 1, 4)


def test_the_configuration_comes_back_and_older_ones_have_no_exits() -> None:
    assert ClassifierConfig.from_dict(CONFIG.to_dict()) == CONFIG
    older = dataclasses.replace(CONFIG, exits=()).to_dict()
    assert "exits" not in older
    assert ClassifierConfig.from_dict(older).exits == ()


@pytest.mark.parametrize("num_layers", range(1, 14))
def test_segments_are_as_even_as_can_be(num_layers: int) -> None:
    for segments in range(1, num_layers + 1):
        ends = (0, *even_exits(num_layers, segments), num_layers)
        sizes = [end - start for start, end in pairwise(ends)]
        assert len(sizes) == segments
        assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1


# error messages


@pytest.mark.parametrize("exits", [(0,), (5,), (3, 2), (2, 2), (-1,), (2.0,)])
def test_exits_that_are_no_inner_blocks(exits: Any) -> None:
    with pytest.raises(ConfigError, match=r"must name inner blocks, rising: of 5 blocks 1 to 4"):
        dataclasses.replace(CONFIG, exits=exits)


def test_an_encoder_with_focus_has_none() -> None:
    encoder = dataclasses.replace(CONFIG.encoder, focus=Focus(after_layer=1))
    with pytest.raises(ConfigError, match="an encoder with focus has no exits"):
        dataclasses.replace(CONFIG, encoder=encoder)


def test_more_segments_than_blocks() -> None:
    with pytest.raises(ConfigError, match="segments=4 must be 1 to 3"):
        even_exits(3, 4)
