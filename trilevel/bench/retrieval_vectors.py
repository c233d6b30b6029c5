"""Vectors of token rows, kept on disk, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import trilevel
from trilevel.conversion.embedder import Embedder
from trilevel.data.token_rows import batches
from trilevel.errors import InputError
from trilevel.model.encoder import Encoder

SAVED_TOKENS = 65_536
"""So many are embedded before they are written."""


def weights_hash(encoder: Encoder) -> str:
    """Of everything that decides a vector: weights, configuration, version of trilevel."""
    digest = hashlib.sha256(json.dumps([trilevel.__version__, encoder.config.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Vectors:
    """An embedder whose vectors are looked up by the hash of weights and ids before they are computed.

    Args:
        embedder: computes what is missing.
        path: of an SQLite file, made if absent; deleting it forgets everything.
    """

    def __init__(self, embedder: Embedder, path: Path) -> None:
        self.embedder = embedder
        self._weights = weights_hash(embedder.source.encoder) + json.dumps(repr(embedder.source.sentence))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path)
            self._base.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        except (OSError, sqlite3.DatabaseError) as error:
            raise InputError(
                f"{path} cannot keep vectors ({error}). Delete it, or work in a writable folder."
            ) from error

    def close(self) -> None:
        """Let the file go."""
        self._base.close()

    def of(self, rows: Sequence[Tensor], told: Callable[[int], None] = lambda _tokens: None) -> Tensor:
        """Vectors (rows, dim); `told` of tokens as they are done, looked up or computed."""
        keys = [self._key(row) for row in rows]
        known = {key: vector for key in set(keys) if (vector := self._read(key)) is not None}
        told(sum(len(row) for key, row in zip(keys, rows, strict=True) if key in known))
        missing = [place for place, key in enumerate(keys) if key not in known]
        for group in batches([len(rows[place]) for place in missing], SAVED_TOKENS):
            places = [missing[place] for place in group]
            vectors = self.embedder.embed_tokens([rows[place] for place in places])
            own = {keys[place]: vector for place, vector in zip(places, vectors.numpy(), strict=True)}
            with self._base:
                self._base.executemany(
                    "INSERT OR REPLACE INTO vectors VALUES (?, ?)",
                    [(key, vector.tobytes()) for key, vector in own.items()],
                )
            known |= own
            told(sum(len(rows[place]) for place in places))
        return torch.from_numpy(np.stack([known[key] for key in keys]))

    def of_chunks(
        self, rows: Sequence[Tensor], size: int, told: Callable[[int], None] = lambda _tokens: None
    ) -> Tensor:
        """The mean of the vectors of each row's chunks, (rows, dim), divided by its length."""
        chunks = [self.chunks(row, size) for row in rows]
        vectors = self.of([chunk for own in chunks for chunk in own], told)
        means = [own.mean(0) for own in vectors.split([len(own) for own in chunks])]
        return F.normalize(torch.stack(means), dim=1)

    def chunks(self, row: Tensor, size: int) -> list[Tensor]:
        """A row as rows of at most `size` ids, the special tokens around each."""
        around = self.embedder.source.tokenizer.num_special_tokens_to_add(False)
        begin, end = row[: around - around // 2], row[len(row) - around // 2 :]
        inner = row[len(begin) : len(row) - len(end)]
        return [torch.cat([begin, part, end]) for part in inner.split(size - around)] or [row]

    def _key(self, row: Tensor) -> bytes:
        return hashlib.sha256(self._weights.encode() + row.numpy().tobytes()).digest()

    def _read(self, key: bytes) -> np.ndarray | None:
        found = self._base.execute("SELECT vector FROM vectors WHERE key = ?", (key,)).fetchone()
        return None if found is None else np.frombuffer(found[0], np.float32)
