"""ListOps of the Long Range Arena: nested operations on digits, 500 to 2,000 tokens, the answer is one digit.

The distribution is that of `lra_benchmarks/data/listops.py` (Tay et al., arXiv 2011.04006): an inner node with
probability 1/4, two to ten arguments, depth at most ten, expressions outside the length limits drawn anew. The binary
parentheses that its files carry are left out, as its input pipeline does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Literal

import torch
from torch import Tensor

from trilevel.errors import ConfigError, InputError

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
INNER_PROBABILITY = 0.25
VOCABULARY = ("<pad>", *(str(digit) for digit in range(10)), *OPERATORS, END)
TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}

Split = Literal["train", "val", "test"]


class _TooLongError(Exception):
    """The expression being drawn has passed the length limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """One expression: its tokens and the digit it evaluates to."""

    tokens: tuple[str, ...]
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOps:
    """A data set without an end: sample `index` of a split is a function of (seed, split, index) alone.

    Args:
        min_length: expressions are longer than this.
        max_length: expressions are shorter than this.
        max_depth: levels of nesting; a digit alone has depth 1.
        max_args: arguments of one operator, at least two.
        seed: another seed, another data set.

    >>> " ".join(ListOps(min_length=5, max_length=12).sample("train", 0).tokens).startswith("[")
    True
    """

    min_length: int = 500
    max_length: int = 2_000
    max_depth: int = 10
    max_args: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.max_args < 2 or self.max_depth < 1 or self.max_length < self.min_length + 2:
            raise ConfigError(
                f"ListOps: max_args={self.max_args} must be >= 2, max_depth={self.max_depth} >= 1 and max_length="
                f"{self.max_length} >= min_length + 2 (min_length={self.min_length})."
            )

    def sample(self, split: Split, index: int) -> Expression:
        """Draw expression `index` of a split."""
        rng = random.Random(f"listops:{self.seed}:{split}:{index}")
        while True:
            try:
                tokens = tuple(self._draw(rng))
            except _TooLongError:
                continue
            if self.min_length < len(tokens) < self.max_length:
                return Expression(tokens=tokens, value=evaluate(tokens))

    def batch(self, split: Split, indices: Sequence[int]) -> dict[str, Tensor]:
        """Collate samples: `input_ids` and `padding_mask` (batch, tokens), True = padding, and `labels` (batch,)."""
        samples = [self.sample(split, index) for index in indices]
        longest = max(len(sample.tokens) for sample in samples)
        input_ids = torch.zeros(len(samples), longest, dtype=torch.long)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.tokens)] = torch.tensor([TOKEN_IDS[token] for token in sample.tokens])
        labels = torch.tensor([sample.value for sample in samples])
        return {"input_ids": input_ids, "padding_mask": input_ids == 0, "labels": labels}

    def _draw(self, rng: random.Random) -> list[str]:
        tokens: list[str] = []
        for token in _nodes(rng, 1, self.max_depth, self.max_args):
            tokens.append(token)
            # an expression that is already too long would be refused whatever follows
            if len(tokens) >= self.max_length:
                raise _TooLongError
        return tokens


def _nodes(rng: random.Random, depth: int, max_depth: int, max_args: int) -> Iterator[str]:
    if depth >= max_depth or rng.random() > INNER_PROBABILITY:
        yield str(rng.randrange(10))
        return
    yield rng.choice(OPERATORS)
    for _ in range(rng.randint(2, max_args)):
        yield from _nodes(rng, depth + 1, max_depth, max_args)
    yield END


def evaluate(tokens: Sequence[str]) -> int:
    """Value of an expression; the median of an even number of digits is their mean, rounded down.

    >>> evaluate("[MAX 2 9 [MIN 4 7 ] 0 ]".split())
    9

    Raises:
        InputError: the tokens are no well-formed expression.
    """
    stack: list[list[str | int]] = [[]]
    for token in tokens:
        if token in OPERATORS:
            stack.append([token])
        elif token == END:
            if len(stack) < 2 or len(stack[-1]) < 2:
                raise InputError("ListOps: ']' closes no operator with arguments. Check the tokens.")
            operator, *arguments = stack.pop()
            stack[-1].append(_apply(str(operator), [int(argument) for argument in arguments]))
        elif token in TOKEN_IDS and token.isdigit():
            stack[-1].append(int(token))
        else:
            raise InputError(f"ListOps: {token!r} is no digit, operator or ']'. Known: {' '.join(VOCABULARY[1:])}.")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise InputError("ListOps: the tokens are not one complete expression. Close every operator with ']'.")
    return int(stack[0][0])


def _apply(operator: str, arguments: list[int]) -> int:
    if operator == "[MIN":
        return min(arguments)
    if operator == "[MAX":
        return max(arguments)
    if operator == "[SM":
        return sum(arguments) % 10
    low, high = median_low(arguments), sorted(arguments)[len(arguments) // 2]
    return (low + high) // 2
