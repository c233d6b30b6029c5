"""The tokenizer: byte-level BPE trained by this project on the train splits, read from one `tokenizer.json`.

Any text has tokens (bytes are the last resort). Text is lower-cased and brought to NFKC before: the model sees it, the
summary does not. Token 0 is padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trilevel.errors import CheckpointError, require

PADDING = "<pad>"
PADDING_ID = 0


class DocumentTokenizer:
    """Token ids of many short texts at once."""

    def __init__(self, inner: Any) -> None:
        """Wrap a `tokenizers.Tokenizer` whose token 0 is the padding."""
        self._inner = inner

    @property
    def vocab_size(self) -> int:
        """Number of tokens, padding included."""
        return int(self._inner.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return [list(e.ids) for e in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, lower case."""
        return str(self._inner.decode(list(ids)))

    def digest(self) -> str:
        """A hash of the vocabulary and the rules."""
        return hashlib.sha256(self.to_str().encode()).hexdigest()

    def to_str(self) -> str:
        """The vocabulary and the rules as JSON: the content of `tokenizer.json`."""
        return str(self._inner.to_str())

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`."""
        Path(path).write_text(self.to_str(), encoding="utf-8")


def load_tokenizer(path: str | Path) -> DocumentTokenizer:
    """Read a `tokenizer.json`.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    tokenizers = require("tokenizers", extra="documents")
    try:
        return DocumentTokenizer(tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path}: no tokenizer there ({error.strerror}); it lies beside the model.") from error
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise CheckpointError(f"{path}: not a tokenizer ({error}). Copy the file again or train one.") from error


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> DocumentTokenizer:
    """Byte-level BPE over `texts`; the same texts in the same order give the same tokenizer."""
    tokenizers = require("tokenizers", extra="documents")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=False),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True),
        ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=3,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return DocumentTokenizer(inner)
