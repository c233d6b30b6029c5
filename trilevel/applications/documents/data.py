"""Documents as tensors: the cached corpus, and batches that depend on the step alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from trilevel.applications.documents.encoded import Encoded, encode, padded
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import UNITS_VERSION, split_units
from trilevel.data.documents import Document
from trilevel.data.places import cache_dir
from trilevel.errors import InputError, require


class DocumentBatch(TypedDict):
    """Padded documents; `unit_ids` is -1 on padding; what stands on padded units is zero or False.

    Shapes: input_ids, padding_mask (True = padding), unit_ids, global_prior (batch, tokens); unit_features
    (batch, units, 11); unit_prior, unit_padding, unit_selectable (both bool), oracle, gains (batch, units); where the
    documents have them, unit_vectors (batch, units, dim).
    """

    input_ids: Tensor
    padding_mask: Tensor
    unit_ids: Tensor
    global_prior: Tensor
    unit_features: Tensor
    unit_prior: Tensor
    unit_padding: Tensor
    unit_selectable: Tensor
    oracle: Tensor
    gains: Tensor
    unit_vectors: NotRequired[Tensor]


def collate(documents: Sequence[Encoded]) -> DocumentBatch:
    """Pad documents to one batch."""
    arrays = padded(documents).items()
    return cast("DocumentBatch", {name: torch.from_numpy(array) for name, array in arrays})


def encode_corpus(documents: Sequence[Document], tokenizer: DocumentTokenizer) -> list[Encoded]:
    """Encode documents with their oracle labels, or read them from the cache (npz, by hash of text and tokenizer)."""
    digest = hashlib.sha256(f"{UNITS_VERSION} {tokenizer.digest()}".encode())
    for document in documents:
        for part in (document.title, document.text, document.abstract):
            digest.update(hashlib.sha256(part.encode()).digest())
    path = cache_dir() / f"documents-{digest.hexdigest()[:24]}.npz"
    if not path.exists():
        track = require("rich.progress", extra="train").track
        encoded = [
            encode(split_units(document), tokenizer, abstract=document.abstract)
            for document in track(documents, description="tokens and oracle labels", transient=True)
        ]
        _store(path, encoded)
    return _restore(path)


_PER_TOKEN = ("input_ids", "unit_ids")
_PER_UNIT = ("unit_prior", "unit_features", "unit_selectable", "oracle", "gains")


def _store(path: Path, encoded: Sequence[Encoded]) -> None:
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(e, name) for e in encoded]) for name in (*_PER_TOKEN, *_PER_UNIT)
    }
    arrays["unit_features"] = arrays["unit_features"].astype(np.int8)
    arrays["tokens"] = np.array([e.num_tokens for e in encoded])
    arrays["units"] = np.array([len(e.unit_prior) for e in encoded])
    # a name of its own until it is whole: two processes may make the same file
    partial = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def _restore(path: Path) -> list[Encoded]:
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    token_ends, unit_ends = np.cumsum(arrays["tokens"]), np.cumsum(arrays["units"])
    found = []
    for t_end, t, u_end, u in zip(token_ends, arrays["tokens"], unit_ends, arrays["units"], strict=True):
        parts = {name: arrays[name][t_end - t : t_end] for name in _PER_TOKEN}
        parts |= {name: arrays[name][u_end - u : u_end] for name in _PER_UNIT}
        found.append(Encoded(**parts))
    return found


class DocumentBatches:
    """Batches of documents of like length; `.batch(step)` depends on the seed and the step alone.

    An epoch is a new order: documents sorted by length with a tenth of noise, cut into batches of at most
    `max_batch_tokens` padded tokens (a longer document is a batch of its own), batches shuffled.
    """

    def __init__(self, documents: Sequence[Encoded], *, max_tokens: int, max_batch_tokens: int, seed: int = 0) -> None:
        """Cut every document to `max_tokens`; documents left without an oracle sentence are not used."""
        self._documents = [d for d in (document.cut(max_tokens) for document in documents) if d.oracle.any()]
        if not self._documents:
            raise InputError("No document has an oracle sentence; training needs documents with an abstract.")
        self._max_batch_tokens = max_batch_tokens
        self._seed = seed
        self._plans: dict[int, list[list[int]]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of the first epoch; others differ by a few."""
        return len(self._plan(0))

    def batch(self, step: int) -> DocumentBatch:
        """The batch of this step."""
        epoch = 0
        while step >= len(self._plan(epoch)):
            step -= len(self._plan(epoch))
            epoch += 1
        return collate([self._documents[i] for i in self._plan(epoch)[step]])

    def _plan(self, epoch: int) -> list[list[int]]:
        if epoch not in self._plans:
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, epoch))
        lengths = np.array([document.num_tokens for document in self._documents])
        order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(lengths)), kind="stable")
        plan: list[list[int]] = [[]]
        longest = 0
        for i in order:
            longest = max(longest, int(lengths[i]))
            if plan[-1] and longest * (len(plan[-1]) + 1) > self._max_batch_tokens:
                plan.append([])
                longest = int(lengths[i])
            plan[-1].append(int(i))
        return [plan[i] for i in rng.permutation(len(plan))]
