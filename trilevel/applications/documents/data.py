"""Documents as tensors: encoding of one document, the cached corpus, and batches that depend on the step alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from trilevel.applications.documents import labels
from trilevel.applications.documents.tokenizer import PADDING_ID, DocumentTokenizer
from trilevel.applications.documents.units import (
    FEATURE_SIZES,
    UNITS_VERSION,
    Unit,
    features,
    selectable,
    split_units,
)
from trilevel.data.documents import Document
from trilevel.errors import InputError, require

MAX_TOKENS = 65_536
MAX_UNIT_TOKENS = 128
_TEXTS_AT_ONCE = 512


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """One document as arrays: `input_ids` and `unit_ids` (tokens,), the others (units, ...).

    `unit_vectors` (units, dim) are those of a frozen encoder, where they were computed before.
    """

    input_ids: np.ndarray
    unit_ids: np.ndarray
    unit_prior: np.ndarray
    unit_features: np.ndarray
    unit_selectable: np.ndarray
    oracle: np.ndarray
    gains: np.ndarray
    units_left_out: int = 0
    unit_vectors: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def num_units(self) -> int:
        """Number of units."""
        return len(self.unit_prior)

    def cut(self, max_tokens: int) -> Encoded:
        """The same document with whole units up to `max_tokens` tokens (at least one unit)."""
        if self.num_tokens <= max_tokens:
            return self
        kept = max(1, int(self.unit_ids[max_tokens]))
        tokens = min(max_tokens, int(np.searchsorted(self.unit_ids, kept)))
        return Encoded(
            input_ids=self.input_ids[:tokens],
            unit_ids=self.unit_ids[:tokens],
            unit_prior=self.unit_prior[:kept],
            unit_features=self.unit_features[:kept],
            unit_selectable=self.unit_selectable[:kept],
            oracle=self.oracle[:kept],
            gains=self.gains[:kept],
            units_left_out=self.units_left_out + len(self.unit_prior) - kept,
            unit_vectors=None if self.unit_vectors is None else self.unit_vectors[:kept],
        )


def encode(
    units: Sequence[Unit], tokenizer: DocumentTokenizer, *, abstract: str = "", max_tokens: int | None = None
) -> Encoded:
    """Tokens and features of a document's units; with an abstract, oracle labels as well.

    A unit keeps its first 128 tokens, the document whole units up to `max_tokens`; features are those of all units.
    A unit that gives no token (spaces, say) gets the padding token, so that unit ids stay complete.

    Raises:
        InputError: there is no unit.
    """
    if not units:
        raise InputError("The document has no title, heading or sentence; text with at least one word is needed.")
    units = list(units)
    ids = _token_ids([unit.text for unit in units], tokenizer, max_tokens)
    kept = len(ids)
    mask = selectable(units)
    oracle, gains = np.zeros(len(units), np.float32), np.zeros(len(units), np.float32)
    if abstract:
        texts = [unit.text for unit in units]
        oracle[labels.oracle(texts, abstract, mask.tolist())] = 1.0
        gains = labels.sentence_gains(texts, abstract) * mask
    encoded = Encoded(
        input_ids=np.concatenate([np.array(found, np.int32) for found in ids]),
        unit_ids=np.repeat(np.arange(kept, dtype=np.int32), [len(found) for found in ids]),
        unit_prior=np.array([unit.prior for unit in units[:kept]], np.float32),
        unit_features=features(units)[:kept],
        unit_selectable=mask[:kept],
        oracle=oracle[:kept],
        gains=gains[:kept],
        units_left_out=len(units) - kept,
    )
    return encoded if max_tokens is None else encoded.cut(max_tokens)


def _token_ids(texts: list[str], tokenizer: DocumentTokenizer, max_tokens: int | None) -> list[list[int]]:
    """Token ids of each text until `max_tokens` is passed; a document of many megabytes is not read to its end."""
    found: list[list[int]] = []
    total = 0
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        if max_tokens is not None and total > max_tokens:
            break
        for ids in tokenizer.encode(texts[start : start + _TEXTS_AT_ONCE]):
            found.append(ids[:MAX_UNIT_TOKENS] or [PADDING_ID])
            total += len(found[-1])
    return found


def collate(documents: Sequence[Encoded]) -> DocumentBatch:
    """Pad documents to one batch."""
    tokens = max(document.num_tokens for document in documents)
    units = max(len(document.unit_prior) for document in documents)
    batch = len(documents)
    input_ids = np.full((batch, tokens), PADDING_ID, np.int64)
    unit_ids = np.full((batch, tokens), -1, np.int64)
    prior = np.zeros((batch, tokens), np.float32)
    unit_features = np.zeros((batch, units, len(FEATURE_SIZES)), np.int64)
    unit_prior = np.zeros((batch, units), np.float32)
    unit_padding = np.ones((batch, units), bool)
    chosen = np.zeros((batch, units), bool)
    oracle, gains = np.zeros((batch, units), np.float32), np.zeros((batch, units), np.float32)
    for row, document in enumerate(documents):
        n, m = document.num_tokens, len(document.unit_prior)
        input_ids[row, :n] = document.input_ids
        unit_ids[row, :n] = document.unit_ids
        prior[row, :n] = document.unit_prior[document.unit_ids]
        unit_features[row, :m] = document.unit_features
        unit_prior[row, :m] = document.unit_prior
        unit_padding[row, :m] = False
        chosen[row, :m] = document.unit_selectable
        oracle[row, :m], gains[row, :m] = document.oracle, document.gains
    made = DocumentBatch(
        input_ids=torch.from_numpy(input_ids),
        padding_mask=torch.from_numpy(unit_ids < 0),
        unit_ids=torch.from_numpy(unit_ids),
        global_prior=torch.from_numpy(prior),
        unit_features=torch.from_numpy(unit_features),
        unit_prior=torch.from_numpy(unit_prior),
        unit_padding=torch.from_numpy(unit_padding),
        unit_selectable=torch.from_numpy(chosen),
        oracle=torch.from_numpy(oracle),
        gains=torch.from_numpy(gains),
    )
    vectors = [document.unit_vectors for document in documents]
    if all(own is not None for own in vectors):
        made["unit_vectors"] = _padded([own for own in vectors if own is not None], units)
    return made


def _padded(vectors: Sequence[np.ndarray], units: int) -> Tensor:
    """Vectors (units, dim) of each document as (batch, units, dim) float32, zero on padding."""
    padded = np.zeros((len(vectors), units, vectors[0].shape[1]), np.float32)
    for row, own in enumerate(vectors):
        padded[row, : len(own)] = own
    return torch.from_numpy(padded)


def cache_dir() -> Path:
    """Where made-again-able files lie: `TRILEVEL_CACHE`, else `~/.cache/trilevel`."""
    root = Path(os.environ.get("TRILEVEL_CACHE") or Path.home() / ".cache" / "trilevel")
    root.mkdir(parents=True, exist_ok=True)
    return root


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
