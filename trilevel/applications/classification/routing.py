"""Texts as samples of dynamic paths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trilevel.applications.classification.data import Columns, check_labels, load_data
from trilevel.artifact.manifest import Artifact, labels_of
from trilevel.artifact.routed import LENGTH_STEP
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.data.token_rows import encode
from trilevel.errors import InputError
from trilevel.routing.samples import Samples
from trilevel.routing.steps import Arrays


def load_samples(
    artifact: Artifact, data: str | Path, *, split: str | None = None, limit: int | None = None
) -> Samples:
    """Texts of a split of a table, or of all rows; equal texts are one group.

    Args:
        artifact: of a classifier, which says the classes, the tokenizer and the columns.
        data: a table with the columns of the training.
        split: `train`, `valid` or `test`, as the training split them; None for all rows.
        limit: rows at most.

    Raises:
        InputError: the table cannot be read, lacks a column, has a label that the model does not know, or no such row.
    """
    path, settings, labels = Path(data), artifact.manifest.settings, labels_of(artifact.manifest)
    columns = Columns(
        text=str(settings["text_column"]),
        label=str(settings.get("label_column", "label")),
        split=settings.get("split_column") if split else None,
    )
    found = load_data(path, columns, valid_fraction=float(settings.get("valid_fraction", 0.1)))
    names = (split,) if split else tuple(found.examples)
    examples = [example for name in names for example in found.examples[name]][:limit]
    if not examples:
        raise InputError(f"{path}: no row{f' in the split {split!r}' if split else ''}.")
    check_labels(examples, tuple(labels), path)
    texts = [example.text for example in examples]
    most, padding_id = int(settings["max_tokens"]), int(settings["padding_id"])
    rows, _ = encode(read_tokenizer(artifact), texts, max_tokens=most, padding_id=padding_id)
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]

    def collate(chosen: Sequence[Sequence[int]], length: int) -> Arrays:
        ids = np.full((len(chosen), length), padding_id, np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(chosen):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    return Samples(
        task="classification",
        rows=rows,
        digests=digests,
        groups=np.unique(digests, return_inverse=True)[1],
        labels=np.array([labels.index(example.label) for example in examples]),
        length_of=lambda row: min(most, -(-len(row) // LENGTH_STEP) * LENGTH_STEP),
        collate=collate,
        resize=lambda row, length: np.resize(np.asarray(row), length).tolist(),
    )
