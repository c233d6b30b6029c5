"""Rows of token ids: cut, put into batches of like length, padded; with numpy alone, for devices without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import InputError

Ids = npt.NDArray[np.int64]
BATCH_TOKENS = 16_384
"""Padded tokens of one forward pass; a longer text has one of its own."""

_TEXTS_AT_ONCE = 256
# a text is cut here before it is tokenised, far behind the last token that is read of most
_CHARACTERS_A_TOKEN = 32


def check_texts(texts: Sequence[str]) -> None:
    """Raise `InputError` unless this is a sequence of texts."""
    if isinstance(texts, str):
        raise InputError("texts is one text; give a list of them, [text].")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts[{place}] is a {type(text).__name__}; a text (str) is needed.")


def check_lengths(lengths: Sequence[int], most: int, name: str) -> None:
    """Raise `InputError` if a row has more tokens than a model, `name`, reads."""
    for place, length in enumerate(lengths):
        if length > most:
            raise InputError(
                f"text {place} has {length:,} tokens and {name} reads {most:,} at most. Cut longer texts with "
                f"max_tokens={most}, or split them."
            )


def characters(text: str) -> str:
    r"""A text with a question mark for what is no character (half a surrogate pair), which no tokenizer takes.

    >>> characters("one \ud800 two")
    'one ? two'
    """
    return text.encode("utf-8", "replace").decode()


def cut(ids: Sequence[int], max_tokens: int | None, *, behind: int) -> Sequence[int]:
    """At most `max_tokens` ids, the last `behind` of them kept.

    >>> cut([101, 7, 8, 9, 102], 4, behind=1)
    [101, 7, 8, 102]
    """
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    return [*ids[: max_tokens - behind], *ids[len(ids) - behind :]]


def encode(
    tokenizer: Any, texts: Sequence[str], *, max_tokens: int, padding_id: int = 0
) -> tuple[list[Sequence[int]], int]:
    """Token ids of each text, with the model's special tokens; and how many texts were cut.

    A longer text keeps its end mark. A text that gives no token at all is one padding token.
    """
    found, num_cut = [], 0
    most = _CHARACTERS_A_TOKEN * max_tokens
    behind = tokenizer.num_special_tokens_to_add(False) // 2
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        for text, encoded in zip(some, tokenizer.encode_batch([text[:most] for text in some]), strict=True):
            # the start was not enough where a token, or the space around it, has very many characters
            is_short = len(text) > most and len(encoded.ids) <= max_tokens
            ids = (tokenizer.encode(text).ids if is_short else encoded.ids) or [padding_id]
            found.append(cut(ids, max_tokens, behind=behind))
            num_cut += len(ids) > max_tokens
    return found, num_cut


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of rows that run together, the longest first, each batch of at most `batch_tokens` padded tokens.

    A row that is longer has a batch of its own, and rows without tokens have none.

    >>> list(batches([2, 9, 0, 3, 4], 8))
    [[1], [4, 3], [0]]
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not lengths[place]:
            break
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], padding_id: int) -> dict[str, Ids]:
    """`input_ids` and `attention_mask`, 1 at real tokens, each (rows, tokens).

    >>> pad([[5, 6], [7]], 0)["input_ids"].tolist()
    [[5, 6], [7, 0]]
    """
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), padding_id, np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def softmax(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Along the last axis, in float64.

    >>> softmax(np.zeros((1, 2))).tolist()
    [[0.5, 0.5]]
    """
    wide = np.asarray(logits, np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    shares: npt.NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return shares
