"""Texts as samples of dynamic paths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trilevel.applications.classification.checkpoint import Run
from trilevel.applications.classification.evaluate import held_out
from trilevel.data.token_rows import encode
from trilevel.routing.samples import Samples
from trilevel.routing.steps import Arrays

LENGTH_STEP = 32
"""Texts are padded to a multiple of so many tokens, so that they find others of their length."""


def load_samples(
    run: Run, data: str | Path | None, split: str | None, *, limit: int | None = None, cache: Path | None = None
) -> Samples:
    """Texts of a split of the run's table, or of another with the same columns; equal texts are one group.

    Raises:
        InputError: as `held_out` says.
    """
    found = held_out(run, None if data is None else Path(data), split=split, limit=limit)
    config, texts = run.model.config, [example.text for example in found.examples]
    rows, _ = encode(run.tokenizer, texts, max_tokens=config.max_tokens, padding_id=config.padding_id)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]

    def collate(chosen: Sequence[Sequence[int]], length: int) -> Arrays:
        ids = np.full((len(chosen), length), config.padding_id, np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(chosen):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    return Samples(
        task="classification",
        rows=rows,
        digests=digests,
        groups=np.unique(digests, return_inverse=True)[1],
        labels=np.array([run.labels.index(example.label) for example in found.examples]),
        length_of=lambda row: min(config.max_tokens, -(-len(row) // LENGTH_STEP) * LENGTH_STEP),
        collate=collate,
    )
