"""ListOps: values against an oracle that rewrites the text, the limits of the distribution, determinism."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from trilevel.data.listops import OPERATORS, TOKEN_IDS, ListOps, evaluate
from trilevel.errors import ConfigError, InputError

INNERMOST = re.compile(r"\[(MIN|MAX|MED|SM) ((?:\d )+)\]")
REDUCE: dict[str, Callable[[list[int]], int]] = {
    "MIN": min,
    "MAX": max,
    "MED": lambda digits: int(np.median(digits)),
    "SM": lambda digits: sum(digits) % 10,
}


def rewrite(text: str) -> int:
    """Replace innermost brackets by their value until one digit is left."""
    while "[" in text:
        text = INNERMOST.sub(lambda found: str(REDUCE[found[1]]([int(d) for d in found[2].split()])), text)
    return int(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("[MIN 4 2 9 ]", 2), ("[MED 1 2 ]", 1), ("[MED 9 1 5 ]", 5), ("[SM 9 8 [MAX 3 6 ] ]", 3)],
)
def test_known_values(text: str, value: int) -> None:
    assert evaluate(text.split()) == value


def test_values_agree_with_rewriting_the_text() -> None:
    data = ListOps(min_length=11, max_length=211, seed=3)
    for index in range(40):
        sample = data.sample("train", index)
        assert sample.value == rewrite(" ".join(sample.tokens))


def test_length_and_depth_and_arguments_keep_their_limits() -> None:
    data = ListOps(min_length=13, max_length=101, max_depth=5, max_args=3)
    for index in range(30):
        tokens = data.sample("val", index).tokens
        assert 13 < len(tokens) < 101
        arguments: list[int] = [0]
        for token in tokens:
            if token == "]":
                assert 2 <= arguments.pop() <= 3
            else:
                arguments[-1] += 1
                assert len(arguments) <= 5
                if token in OPERATORS:
                    arguments.append(0)
        assert arguments == [1]


def test_default_lengths_are_those_of_the_arena() -> None:
    lengths = [len(ListOps().sample("test", index).tokens) for index in range(3)]
    assert all(500 < length < 2_000 for length in lengths)


def test_sample_is_a_function_of_seed_split_and_index() -> None:
    data = ListOps(min_length=11, max_length=97)
    assert data.sample("train", 5) == ListOps(min_length=11, max_length=97).sample("train", 5)
    others = [
        data.sample("val", 5),
        data.sample("train", 6),
        ListOps(min_length=11, max_length=97, seed=1).sample("train", 5),
    ]
    assert all(other != data.sample("train", 5) for other in others)


def test_batch_pads_and_labels() -> None:
    data = ListOps(min_length=5, max_length=31)
    batch = data.batch("train", [0, 1, 2])
    for row in range(3):
        sample = data.sample("train", row)
        real = batch["input_ids"][row][~batch["padding_mask"][row]]
        assert real.tolist() == [TOKEN_IDS[token] for token in sample.tokens]
        assert batch["labels"][row] == sample.value
    assert batch["padding_mask"].dtype == torch.bool


@pytest.mark.parametrize("text", ["", "]", "[MAX ]", "[MAX 1 2", "1 2", "[MEAN 1 2 ]", "12", "<pad>"])
def test_malformed_expressions_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="ListOps"):
        evaluate(text.split())


def test_limits_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_length"):
        ListOps(min_length=10, max_length=11)
    with pytest.raises(ConfigError, match="max_args"):
        ListOps(max_args=1)
