"""Inputs of several sizes that an exporter asks torch, and every load a runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilevel.applications.documents.builtin import builtin_document
from trilevel.data.token_rows import pad

SIZES = (
    *((2, 251), (1, 1), (1, 2), (3, 17), (1, 33), (2, 64), (1, 127), (1, 128)),
    *((4, 8), (2, 31), (1, 250), (5, 5), (1, 16), (1, 97), (2, 3), (1, 384)),
)
"""Rows and tokens; the last row of several is shorter."""
_BATCHES = (2, 1, 1, 3, 1, 2, 4, 1, 1, 2, 5, 1, 1, 3, 1, 2)
# side of what has one colour, as images are smooth
_BLOCK = 3


def text_calls(tokenizer: Any, *, max_tokens: int, padding_id: int) -> list[dict[str, Tensor]]:
    """`input_ids` and `attention_mask` (rows, tokens) of built-in text, none longer than `max_tokens`."""
    around = tokenizer.num_special_tokens_to_add(False)
    marks = tokenizer.encode("").ids
    begin, end = marks[: around - around // 2], marks[around - around // 2 :]
    plain = tokenizer.encode(builtin_document().text, add_special_tokens=False).ids or [padding_id]
    calls, start = [], 0
    for count, most in SIZES:
        rows = []
        for place in range(count):
            length = min(most, max_tokens)
            if place == count - 1 and count > 1:
                length = max(1, length * 3 // 4)
            inner = [plain[(start + step) % len(plain)] for step in range(max(1, length - around))]
            rows.append([*begin, *inner, *end][:length])
            start += len(inner)
        calls.append({name: torch.from_numpy(array) for name, array in pad(rows, padding_id).items()})
    return calls


def image_calls(shape: tuple[int, int, int]) -> list[dict[str, Tensor]]:
    """`pixels` uint8 (images, *shape), channels first: blocks of random colours."""
    channels, height, width = shape
    rng = np.random.default_rng(0)
    calls = []
    for count in _BATCHES:
        small = rng.integers(0, 256, (count, channels, -(-height // _BLOCK), -(-width // _BLOCK)), dtype=np.uint8)
        large = small.repeat(_BLOCK, 2).repeat(_BLOCK, 3)[:, :, :height, :width]
        calls.append({"pixels": torch.from_numpy(np.ascontiguousarray(large))})
    return calls
