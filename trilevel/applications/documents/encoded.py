"""One document as arrays, and several padded to one batch of arrays; numpy alone, as where artifacts run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trilevel.applications.documents import labels
from trilevel.applications.documents.tokenizer import PADDING_ID, DocumentTokenizer
from trilevel.applications.documents.units import FEATURE_SIZES, Unit, features, selectable
from trilevel.errors import InputError

MAX_TOKENS = 65_536
MAX_UNIT_TOKENS = 128
_TEXTS_AT_ONCE = 512


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

    def only(self, units: np.ndarray) -> Encoded:
        """The same document with some units, by their places, in this order."""
        place = np.full(self.num_units, -1, self.unit_ids.dtype)
        place[units] = np.arange(len(units))
        tokens = np.flatnonzero(place[self.unit_ids] >= 0)
        return Encoded(
            input_ids=self.input_ids[tokens],
            unit_ids=place[self.unit_ids[tokens]],
            unit_prior=self.unit_prior[units],
            unit_features=self.unit_features[units],
            unit_selectable=self.unit_selectable[units],
            oracle=self.oracle[units],
            gains=self.gains[units],
            units_left_out=self.units_left_out + self.num_units - len(units),
            unit_vectors=None if self.unit_vectors is None else self.unit_vectors[units],
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


def padded(documents: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """The arrays of a `DocumentBatch`, by name."""
    tokens = max(document.num_tokens for document in documents)
    units = max(document.num_units for document in documents)
    batch = len(documents)
    made: dict[str, np.ndarray] = {
        "input_ids": np.full((batch, tokens), PADDING_ID, np.int64),
        "unit_ids": np.full((batch, tokens), -1, np.int64),
        "global_prior": np.zeros((batch, tokens), np.float32),
        "unit_features": np.zeros((batch, units, len(FEATURE_SIZES)), np.int64),
        "unit_prior": np.zeros((batch, units), np.float32),
        "unit_padding": np.ones((batch, units), bool),
        "unit_selectable": np.zeros((batch, units), bool),
        "oracle": np.zeros((batch, units), np.float32),
        "gains": np.zeros((batch, units), np.float32),
    }
    for row, document in enumerate(documents):
        n, m = document.num_tokens, document.num_units
        made["input_ids"][row, :n], made["unit_ids"][row, :n] = document.input_ids, document.unit_ids
        made["global_prior"][row, :n] = document.unit_prior[document.unit_ids]
        made["unit_padding"][row, :m] = False
        for name in ("unit_features", "unit_prior", "unit_selectable", "oracle", "gains"):
            made[name][row, :m] = getattr(document, name)
    made["padding_mask"] = made["unit_ids"] < 0
    vectors = [document.unit_vectors for document in documents]
    if all(own is not None for own in vectors):
        made["unit_vectors"] = _stacked([own for own in vectors if own is not None], units)
    return made


def _stacked(vectors: Sequence[np.ndarray], units: int) -> np.ndarray:
    """Vectors (units, dim) of each document as (batch, units, dim) float32, zero on padding."""
    stacked = np.zeros((len(vectors), units, vectors[0].shape[1]), np.float32)
    for row, own in enumerate(vectors):
        stacked[row, : len(own)] = own
    return stacked
