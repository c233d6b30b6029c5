"""Logits of texts: sorted by length, in batches that fit, in the order they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.applications.classification.batches import cut, encode
from trilevel.applications.classification.checkpoint import Run
from trilevel.conversion.sequences import pad

BATCH_SIZE, MAX_BATCH_TOKENS = 64, 16_384


def logits_of(
    model: nn.Module,
    sequences: Sequence[Tensor],
    *,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Tensor:
    """Logits (rows, classes), on the CPU, of token sequences; `on_progress` is told how many rows are done.

    The mode of the model is left as it is; it is in evaluation mode where results shall be the same each time.
    """
    settings: Any = model.config
    device = next(model.parameters()).device
    lengths = [len(sequence) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lengths.__getitem__)
    found = torch.empty(len(sequences), len(settings.labels))
    done = 0
    with torch.inference_mode():
        for rows in cut(order, lengths, batch_size=BATCH_SIZE, max_batch_tokens=MAX_BATCH_TOKENS):
            input_ids, padding_mask = pad([sequences[row] for row in rows], settings.padding_id)
            found[rows] = model(input_ids.to(device), padding_mask=padding_mask.to(device)).float().cpu()
            done += len(rows)
            on_progress(done)
    return found


def classify(run: Run, texts: Sequence[str], *, on_progress: Callable[[int], None] = lambda _done: None) -> Tensor:
    """Probabilities (texts, classes): softmax of the logits in float64, not calibrated; classes as in `run.labels`.

    A text without a word is classified as well; what comes out means nothing.
    """
    config = run.model.config
    sequences, _ = encode(run.tokenizer, texts, max_tokens=config.max_tokens, padding_id=config.padding_id)
    return torch.softmax(logits_of(run.model, sequences, on_progress=on_progress).double(), dim=-1)
