"""Texts to token sequences: what calibration, distillation and embedding read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trilevel.conversion.source import Source
from trilevel.errors import InputError

MIN_TOKENS = 8
"""Of a piece of text; shorter ends say nothing about attention."""
CHARACTERS_A_TOKEN = 16
"""More than any usual text has."""


def token_ids(source: Source, text: str, *, max_tokens: int | None = None) -> Tensor:
    """Ids of a text with the model's special tokens around it, (tokens,); cut at `max_tokens`, the last one kept.

    Raises:
        InputError: the encoder reads images.
    """
    _check_text(source)
    ids = source.tokenizer.encode(text).ids
    if max_tokens is not None and len(ids) > max_tokens:
        ids = [*ids[: max_tokens - 1], ids[-1]]
    return torch.tensor(ids)


def pieces(source: Source, texts: Sequence[str], *, max_tokens: int, most: int) -> list[Tensor]:
    """Consecutive pieces of texts, each at most `max_tokens` long with special tokens around it, `most` in all.

    Every text gives its first piece before any gives its second, so that few long texts do not crowd out the others; of
    more than `most` texts, some spread over all of them are read.

    Raises:
        InputError: the encoder reads images.
    """
    _check_text(source)
    around = source.tokenizer.num_special_tokens_to_add(False)
    room = max_tokens - around
    if room < MIN_TOKENS:
        raise InputError(f"max_tokens={max_tokens} leaves {room} tokens of text; at least {MIN_TOKENS} are needed.")
    empty = source.tokenizer.encode("").ids
    begin, end = empty[: around - around // 2], empty[around - around // 2 :]
    chosen = [texts[place * len(texts) // most] for place in range(most)] if len(texts) > most else texts
    # as much of a text as its pieces need: twice their share, as others may be short
    room_for = CHARACTERS_A_TOKEN * max_tokens * 2 * -(-most // max(1, len(chosen)))
    plain = [source.tokenizer.encode(text[:room_for], add_special_tokens=False).ids for text in chosen]
    found: list[Tensor] = []
    start = 0
    while len(found) < most and any(len(ids) - start >= MIN_TOKENS for ids in plain):
        for ids in plain:
            if len(found) < most and len(ids) - start >= MIN_TOKENS:
                found.append(torch.tensor([*begin, *ids[start : start + room], *end]))
        start += room
    return found


def _check_text(source: Source) -> None:
    if source.tokenizer is None:
        raise InputError(f"{source.name} ({source.family}) reads images, not text. Choose an encoder of text.")


def split_off(sequences: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """All but every k-th sequence, and those: `count` of them, spread over the whole."""
    if count >= len(sequences):
        raise InputError(f"{len(sequences)} pieces of text are too few to hold {count} out; give more text.")
    held = {index * len(sequences) // count for index in range(count)}
    rest = [sequence for index, sequence in enumerate(sequences) if index not in held]
    return rest, [sequences[index] for index in sorted(held)]
