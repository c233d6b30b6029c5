"""Documents as samples of dynamic paths: an answer is the sentences chosen, graded by ROUGE-1 to the abstract."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trilevel.applications.documents.artifact import graph_inputs
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.rouge import rouge
from trilevel.applications.documents.summary import choose_units, selection_of
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import Unit, split_units
from trilevel.artifact.manifest import Artifact
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.data.documents import Document, load_jsonl
from trilevel.data.places import data_path
from trilevel.routing.samples import Samples
from trilevel.routing.steps import Arrays

LENGTH_STEP = 256
TOKENS_OF_A_UNIT = 8
"""There are places for tokens over this many units, so that documents of one length can share a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A document with its units and tokens."""

    document: Document
    units: list[Unit]
    encoded: Encoded


def digest_of(document: Document) -> str:
    """SHA-256 of what the model reads."""
    return hashlib.sha256(f"{document.title}\n{document.text}".encode()).hexdigest()


def known_digests(data: str | Path) -> set[str]:
    """Digests of the documents that training had; none where the file knows no splits."""
    documents = load_jsonl(data_path(data))
    return {digest_of(one) for one in documents if one.split == "train"}


def load_samples(
    artifact: Artifact, data: str | Path, *, split: str | None = None, limit: int | None = None
) -> Samples:
    """Documents of a split, or of all; equal texts are one group.

    Args:
        artifact: of a summariser, which has the tokenizer.
        data: `.jsonl` or `.jsonl.xz`; also below TRILEVEL_DATA.
        split: `train`, `valid` or `test`; None for all documents.
        limit: documents at most.

    Raises:
        InputError: the file cannot be read, or has no such document.
    """
    documents = load_jsonl(data_path(data), split=split, limit=limit)
    tokenizer, most = DocumentTokenizer(read_tokenizer(artifact)), int(artifact.manifest.settings["max_tokens"])
    rows = []
    for document in documents:
        units = split_units(document)
        rows.append(Row(document=document, units=units, encoded=encode(units, tokenizer, max_tokens=most)))
    digests = [digest_of(document) for document in documents]
    return Samples(
        task="documents",
        rows=rows,
        digests=digests,
        groups=np.unique(digests, return_inverse=True)[1],
        labels=None,
        length_of=length_of,
        collate=collate,
        resize=_resized,
        judge=judged,
    )


def length_of(row: Row) -> int:
    """Tokens that a document is padded to: room for its tokens, and for its units."""
    least = max(row.encoded.num_tokens, TOKENS_OF_A_UNIT * row.encoded.num_units)
    return -(-least // LENGTH_STEP) * LENGTH_STEP


def collate(rows: Sequence[Row], length: int) -> Arrays:
    """What the graph reads, of documents padded to a length."""
    arrays = graph_inputs([row.encoded for row in rows])
    wanted = {"tokens": length, "units": max(length // TOKENS_OF_A_UNIT, arrays["unit_prior"].shape[1])}
    made = {}
    for name, array in arrays.items():
        more = wanted["units" if name.startswith("unit_") else "tokens"] - array.shape[1]
        # behind the last unit there is nothing: its end goes on
        mode = "edge" if name == "unit_ends" else "constant"
        made[name] = np.pad(array, [(0, 0), (0, more)] + [(0, 0)] * (array.ndim - 2), mode=mode)  # type: ignore[call-overload]
    return made


def judged(row: Row, outputs: np.ndarray) -> tuple[list[tuple[int, ...]], list[float]]:
    """The sentences that each path's scores (paths, units) choose, and their ROUGE-1, 0 to 1; none without abstract."""
    chosen = [
        tuple(choose_units(row.units, scores[: row.encoded.num_units], row.encoded, selection_of()))
        for scores in outputs
    ]
    if not row.document.abstract:
        return chosen, []
    grades = {
        one: rouge(row.document.abstract, [row.units[place].text for place in one])[0] / 100 for one in set(chosen)
    }
    return chosen, [grades[one] for one in chosen]


def _resized(row: Row, length: int) -> Row:
    """A document of about as many tokens, its own repeated."""
    encoded = row.encoded
    while encoded.num_tokens < length:
        encoded = _twice(encoded)
    return replace(row, encoded=encoded.cut(length))


def _twice(one: Encoded) -> Encoded:
    double: dict[str, np.ndarray] = {
        name: np.concatenate([getattr(one, name)] * 2)
        for name in ("input_ids", "unit_prior", "unit_features", "unit_selectable", "oracle", "gains")
    }
    return replace(one, **double, unit_ids=np.concatenate([one.unit_ids, one.unit_ids + one.num_units]))  # type: ignore[arg-type]  # no other fields
