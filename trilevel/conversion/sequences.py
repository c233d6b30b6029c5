"""Texts to token sequences, and sequences to batches: what calibration, distillation and embedding read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilevel.conversion.source import Source
from trilevel.data.token_rows import characters
from trilevel.errors import InputError

MIN_TOKENS = 8
"""Of a piece of text; shorter ends say nothing about attention."""
CHARACTERS_A_TOKEN = 16
"""More than any usual text has."""


def pad(rows: Sequence[Tensor], padding_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as (rows, tokens), and where padding is.

    >>> pad([torch.tensor([5, 6]), torch.tensor([7])], 0)[0]
    tensor([[5, 6],
            [7, 0]])
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) >= lengths[:, None]


def pieces(source: Source, texts: Sequence[str], *, max_tokens: int, most: int) -> list[Tensor]:
    """Consecutive pieces of texts, each at most `max_tokens` long with special tokens around it, `most` in all.

    Every text gives its first piece before any gives its second, so that few long texts do not crowd out the others; of
    more than `most` texts, some spread over all of them are read.

    Raises:
        InputError: the encoder reads images.
    """
    check_text(source)
    around = source.tokenizer.num_special_tokens_to_add(False)
    room = max_tokens - around
    if room < MIN_TOKENS:
        raise InputError(f"max_tokens={max_tokens} leaves {room} tokens of text; at least {MIN_TOKENS} are needed.")
    empty = source.tokenizer.encode("").ids
    begin, end = empty[: around - around // 2], empty[around - around // 2 :]
    chosen = [texts[place * len(texts) // most] for place in range(most)] if len(texts) > most else texts
    # as much of a text as its pieces need: twice their share, as others may be short
    room_for = CHARACTERS_A_TOKEN * max_tokens * 2 * -(-most // max(1, len(chosen)))
    plain = [source.tokenizer.encode(characters(text[:room_for]), add_special_tokens=False).ids for text in chosen]
    found: list[Tensor] = []
    start = 0
    while len(found) < most and any(len(ids) - start >= MIN_TOKENS for ids in plain):
        for ids in plain:
            if len(found) < most and len(ids) - start >= MIN_TOKENS:
                found.append(torch.tensor([*begin, *ids[start : start + room], *end]))
        start += room
    return found


def check_text(source: Source) -> None:
    """Raise `InputError` if an encoder reads images."""
    if source.tokenizer is None:
        raise InputError(f"{source.name} ({source.family}) reads images, not text. Choose an encoder of text.")


def split_off(sequences: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """All but every k-th sequence, and those: `count` of them, spread over the whole."""
    if count >= len(sequences):
        raise InputError(f"{len(sequences)} pieces of text are too few to hold {count} out; give more text.")
    held = {index * len(sequences) // count for index in range(count)}
    rest = [sequence for index, sequence in enumerate(sequences) if index not in held]
    return rest, [sequences[index] for index in sorted(held)]
