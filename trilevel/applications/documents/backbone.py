"""A frozen pretrained encoder in the place of the trained one: vectors of units, and what the model makes of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilevel.applications.documents.encoded import MAX_TOKENS, Encoded
from trilevel.applications.documents.tokenizer import PADDING_ID
from trilevel.conversion.source import Source
from trilevel.data.places import cache_dir
from trilevel.errors import ConfigError, InputError
from trilevel.model.config import from_mapping
from trilevel.model.encoder import Encoder
from trilevel.model.pool import mean_by_unit

# vectors stored by another version are made anew
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """What a document model must know of the frozen encoder below it, and the sizes of its own part.

    Args:
        vector_dim: width of the frozen encoder.
        vocab_size: of its tokenizer.
        ids_before: special tokens in front of a document.
        ids_after: special tokens behind it.
        word_dim: width of a trained table of tokens, whose mean over a unit stands beside its vector; 0 for none.
        dim: width of the part over units.
        num_heads: its attention heads.
        dropout: of the part over units.
        norm_eps: epsilon of its norms.
        rope_theta: base of its rotary positions.
    """

    vector_dim: int
    vocab_size: int
    ids_before: tuple[int, ...]
    ids_after: tuple[int, ...]
    word_dim: int = 0
    dim: int = 128
    num_heads: int = 4
    dropout: float = 0.2
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        """Check what only this part has; the blocks check the rest."""
        for name, least in (("vector_dim", 1), ("vocab_size", 1), ("word_dim", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"Backbone: {name}={getattr(self, name)} must be >= {least}.")

    @property
    def max_tokens(self) -> int:
        """Tokens of a document that leave room for the special ones."""
        return MAX_TOKENS - len(self.ids_before) - len(self.ids_after)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Backbone:
        """The configuration from JSON types.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        values = dict(values)
        for name in ("ids_before", "ids_after"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return from_mapping(cls, values)


def backbone_of(source: Source, **sizes: Any) -> Backbone:
    """The configuration that fits an encoder and its tokenizer; `sizes` are the other arguments of `Backbone`.

    Raises:
        InputError: the encoder reads images.
    """
    if source.tokenizer is None:
        raise InputError(f"{source.name} ({source.family}) reads images, not text. Choose an encoder of text.")
    around = source.tokenizer.encode("").ids
    # what a tokenizer adds stands half in front, the larger half where it is odd
    behind = len(around) // 2
    return Backbone(
        vector_dim=source.encoder.config.dim,
        ids_before=tuple(around[: len(around) - behind]),
        ids_after=tuple(around[len(around) - behind :]),
        vocab_size=source.tokenizer.get_vocab_size(),
        **sizes,
    )


class UnitInput(nn.Module):
    """Vectors of units, how each lies to the mean of its document, and words, to the width of the part over units.

    Args:
        backbone: the sizes.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(backbone.vector_dim, eps=backbone.norm_eps)
        self.map = nn.Linear(2 * backbone.vector_dim, backbone.dim)
        self.dropout = nn.Dropout(backbone.dropout)
        self.words = self.word_map = None
        if backbone.word_dim:
            self.words = nn.Embedding(backbone.vocab_size, backbone.word_dim, padding_idx=PADDING_ID)
            self.word_map = nn.Sequential(
                nn.LayerNorm(backbone.word_dim, eps=backbone.norm_eps), nn.Linear(backbone.word_dim, backbone.dim)
            )
            with torch.no_grad():
                # a hidden word says nothing
                self.words.weight.normal_(std=0.06)[PADDING_ID] = 0.0

    def word_means(self, input_ids: Tensor, unit_ids: Tensor, num_units: int) -> Tensor | None:
        """Means of the table's rows over each unit, (batch, units, word_dim); None without a table."""
        return None if self.words is None else mean_by_unit(self.words(input_ids), unit_ids, num_units=num_units)[0]

    def forward(self, vectors: Tensor, words: Tensor | None, unit_padding: Tensor | None) -> Tensor:
        """Map vectors (batch, units, vector_dim) and means of words (batch, units, word_dim) to (batch, units, dim)."""
        x = self.norm(vectors)
        if unit_padding is None:
            centre = x.mean(1, keepdim=True)
        else:
            real = ~unit_padding[..., None]
            centre = torch.where(real, x, 0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
        centre = F.normalize(centre, dim=-1) * centre.shape[-1] ** 0.5
        mapped: Tensor = self.map(self.dropout(torch.cat([x, x * centre], dim=-1)))
        if words is not None and self.word_map is not None:
            mapped = mapped + self.word_map(words)
        return mapped


@torch.no_grad()
def unit_vectors(encoder: Encoder, backbone: Backbone, input_ids: Tensor, unit_ids: Tensor, num_units: int) -> Tensor:
    """Means of the encoder's tokens over each unit, (batch, units, vector_dim) float32; documents run one by one.

    `input_ids` and `unit_ids` are (batch, tokens) without special tokens, which are added here.
    """
    found = input_ids.new_zeros(len(input_ids), num_units, backbone.vector_dim, dtype=torch.float32)
    before, after = (input_ids.new_tensor(ids) for ids in (backbone.ids_before, backbone.ids_after))
    for row, (ids, units) in enumerate(zip(input_ids, unit_ids, strict=True)):
        real = units >= 0
        hidden = encoder(torch.cat([before, ids[real], after])[None])[:, len(before) :]
        # what stands behind the last unit is no part of it
        hidden = hidden[:, : int(real.sum())].float()
        found[row] = mean_by_unit(hidden, units[real][None], num_units=num_units)[0][0]
    return found


def _digest(encoder: Encoder, backbone: Backbone) -> str:
    """Of everything that decides a vector but the text: configuration, weights, special tokens."""
    values = [_VERSION, encoder.config.to_dict(), backbone.ids_before, backbone.ids_after]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class StoredVectors:
    """Unit vectors of documents, looked up on disk by encoder and tokens before they are computed.

    Each document is a file of its own, written when it is whole: an interrupted run goes on where it stopped.

    Args:
        encoder: the frozen one, in evaluation mode; its precision is that of the computation.
        backbone: its special tokens.
    """

    def __init__(self, encoder: Encoder, backbone: Backbone) -> None:
        self._encoder, self._backbone = encoder, backbone
        self._digest = _digest(encoder, backbone)
        self._folder = cache_dir() / f"unit-vectors-{self._digest[:16]}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, document: Encoded) -> Encoded:
        """The same document with `unit_vectors` (units, vector_dim), float16."""
        path = self._folder / f"{self._key(document)}.npy"
        vectors = _read(path)
        if vectors is None or vectors.shape != (document.num_units, self._backbone.vector_dim):
            vectors = self._computed(document)
            partial = path.with_suffix(f".{os.getpid()}.tmp")
            with partial.open("wb") as file:
                np.save(file, vectors, allow_pickle=False)
            partial.replace(path)
        return replace(document, unit_vectors=vectors)

    def add_all(
        self, documents: Sequence[Encoded], progress: Callable[[float], None] = lambda _done: None
    ) -> list[Encoded]:
        """As `add`, of many documents; `progress` is told the share of the tokens that is done."""
        found: list[Encoded] = []
        done, total = 0, max(1, sum(document.num_tokens for document in documents))
        for document in documents:
            found.append(self.add(document))
            done += document.num_tokens
            progress(done / total)
        return found

    def _computed(self, document: Encoded) -> np.ndarray:
        ids, units = (torch.from_numpy(x.astype(np.int64))[None] for x in (document.input_ids, document.unit_ids))
        vectors = unit_vectors(self._encoder, self._backbone, ids, units, document.num_units)[0].half().numpy()
        if not np.isfinite(vectors).all():
            raise InputError(
                "the pretrained encoder gives vectors that are no numbers, or beyond 65,504; its weights are damaged."
            )
        return vectors

    def _key(self, document: Encoded) -> str:
        digest = hashlib.sha256(self._digest.encode())
        for array in (document.input_ids, document.unit_ids):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return digest.hexdigest()[:32]


def _read(path: Path) -> np.ndarray | None:
    try:
        stored: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        # absent, or damaged: made again
        return None
    return stored
