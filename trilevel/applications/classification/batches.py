"""Texts as token ids, and batches of texts of like length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilevel.conversion.sequences import pad
from trilevel.data import token_rows
from trilevel.errors import InputError

# batches are cut from pools of this many, sorted by length
_POOL = 64


def encode(tokenizer: Any, texts: Sequence[str], *, max_tokens: int, padding_id: int = 0) -> tuple[list[Tensor], int]:
    """Token ids of each text, (tokens,), with the model's special tokens; and how many texts were cut."""
    rows, num_cut = token_rows.encode(tokenizer, texts, max_tokens=max_tokens, padding_id=padding_id)
    return [torch.tensor(row) for row in rows], num_cut


def cut(order: Sequence[int], lengths: Sequence[int], *, batch_size: int, max_batch_tokens: int) -> list[list[int]]:
    """Cut an order of rows into batches of at most `batch_size` rows and `max_batch_tokens` padded tokens.

    A longer row is a batch of its own.

    >>> cut([0, 1, 2, 3], [2, 2, 5, 9], batch_size=3, max_batch_tokens=10)
    [[0, 1], [2], [3]]
    """
    plan: list[list[int]] = []
    longest = 0
    for row in order:
        longest = max(longest, lengths[row])
        if not plan or len(plan[-1]) == batch_size or longest * (len(plan[-1]) + 1) > max_batch_tokens:
            plan.append([])
            longest = lengths[row]
        plan[-1].append(row)
    return plan


class TextBatches:
    """Batches of `input_ids`, `padding_mask` (batch, tokens) and `labels` (batch,), each a function of the step alone.

    An epoch is a new order: rows shuffled, sorted by length within pools of 64 batches, cut into batches, shuffled.
    """

    def __init__(
        self,
        sequences: Sequence[Tensor],
        labels: Sequence[int],
        *,
        batch_size: int,
        max_batch_tokens: int,
        padding_id: int,
        seed: int = 0,
    ) -> None:
        if not sequences:
            raise InputError("no rows to make batches of.")
        self._sequences, self._labels = sequences, torch.tensor(labels)
        self._lengths = [len(sequence) for sequence in sequences]
        self._batch_size, self._max_batch_tokens = batch_size, max_batch_tokens
        self._padding_id, self._seed = padding_id, seed
        # the start of an epoch is known once those before it are planned; one plan is kept
        self._starts = [0]
        self._plan = lru_cache(maxsize=1)(self._make_plan)

    def steps_of(self, epochs: int) -> int:
        """Batches of the first `epochs` epochs."""
        while len(self._starts) <= epochs:
            self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)))
        return self._starts[epochs]

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of this step."""
        epoch = 0
        while self.steps_of(epoch + 1) <= step:
            epoch += 1
        rows = self._plan(epoch)[step - self._starts[epoch]]
        input_ids, padding_mask = pad([self._sequences[row] for row in rows], self._padding_id)
        return {"input_ids": input_ids, "padding_mask": padding_mask, "labels": self._labels[rows]}

    def _make_plan(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._lengths)).tolist()
        size = _POOL * self._batch_size
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        plan: list[list[int]] = []
        for pool in pools:
            pool.sort(key=self._lengths.__getitem__)
            plan += cut(pool, self._lengths, batch_size=self._batch_size, max_batch_tokens=self._max_batch_tokens)
        return [plan[place] for place in rng.permutation(len(plan))]
