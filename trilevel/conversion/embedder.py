"""Texts of any length to vectors, with a dense or a converted encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trilevel.conversion.embed import pooled
from trilevel.conversion.load import load_encoder
from trilevel.conversion.sentence import Sentence
from trilevel.conversion.sequences import check_text, pad
from trilevel.conversion.source import Source
from trilevel.data.token_rows import BATCH_TOKENS, batches, characters, check_lengths, check_texts, cut
from trilevel.errors import InputError
from trilevel.model.encoder import Encoder

_TOKENIZED_AT_ONCE = 64
Progress = Callable[[str, float], None]
State = list[tuple[int, int]]
"""Where each weight lies, and how often it was written."""


class Embedder:
    """One vector for each text, made as the model's own settings say (mean or first token, normalised or not).

    Nothing is cut by default: a text may have as many tokens as the encoder reads (65,536). A dense encoder takes time
    that grows with the square of the tokens, a converted one does not. Texts of similar length run together; the
    vectors are those that each text gives alone, to rounding.

    Args:
        source: from `load_encoder`, `load_source` or `read_converted`.

    Raises:
        InputError: the encoder reads images.
    """

    def __init__(self, source: Source) -> None:
        check_text(source)
        self.source = source
        self._encoders: dict[torch.dtype, tuple[State, Encoder]] = {}

    @classmethod
    def load(cls, name_or_path: str | Path) -> Embedder:
        """Of a folder that `trilevel convert` wrote, or of whatever `load_source` takes.

        Raises:
            CheckpointError, ConfigError, MissingExtraError: as `load_encoder` does.
        """
        return cls(load_encoder(name_or_path))

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self.source.encoder.config.dim

    def tokens(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[Tensor]:
        """Ids of each text with the model's special tokens around it, (tokens,); cut at `max_tokens`, these included.

        Raises:
            InputError: `texts` is no sequence of texts, or `max_tokens` leaves no room for text.
        """
        check_texts(texts)
        tokenizer = self.source.tokenizer
        around = tokenizer.num_special_tokens_to_add(False)
        if max_tokens is not None and max_tokens <= around:
            raise InputError(
                f"max_tokens={max_tokens} leaves no room for text beside {around} special tokens; give {around + 1} or "
                "more."
            )
        found: list[Tensor] = []
        # an encoding holds far more than ids, so few exist at a time
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            encodings = tokenizer.encode_batch(list(map(characters, texts[start : start + _TOKENIZED_AT_ONCE])))
            found += [
                torch.tensor(cut(one.ids, max_tokens, behind=around // 2), dtype=torch.int64) for one in encodings
            ]
        return found

    def embed(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int = BATCH_TOKENS,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
        progress: Progress = lambda _what, _done: None,
    ) -> Tensor:
        """Vectors of texts, float32 (texts, dim), in the order of the texts.

        An empty text is its special tokens; without any it is zeros.

        Args:
            texts: a list of them; one text alone is refused.
            batch_tokens: padded tokens of one forward pass; less takes less memory. A longer text runs alone.
            max_tokens: cut longer texts, special tokens counted; None cuts nothing.
            dtype: of weights and states; bfloat16 is about twice as fast where the processor has it.
            progress: told what is done, and which part of the tokens.

        Raises:
            InputError: as `tokens` does, or a text is longer than the encoder reads.
        """
        progress(f"tokenising {len(texts):,} texts", 0.0)
        rows = self.tokens(texts, max_tokens=max_tokens)
        return self.embed_tokens(rows, batch_tokens=batch_tokens, dtype=dtype, progress=progress)

    def embed_tokens(
        self,
        rows: Sequence[Tensor],
        *,
        batch_tokens: int = BATCH_TOKENS,
        dtype: torch.dtype = torch.float32,
        progress: Progress = lambda _what, _done: None,
    ) -> Tensor:
        """As `embed`, from ids that have their special tokens, each (tokens,).

        Raises:
            InputError: `batch_tokens` is below 1, `dtype` is of integers, or a row is longer than the encoder reads.
        """
        if batch_tokens < 1:
            raise InputError(f"batch_tokens={batch_tokens} must be >= 1.")
        if not dtype.is_floating_point:
            raise InputError(f"dtype={dtype} has no fractions; use torch.float32 or torch.bfloat16.")
        self.check_lengths(rows)
        encoder = self._encoder(dtype)
        out = torch.zeros(len(rows), self.dim)
        done, total = 0, sum(len(row) for row in rows)
        with torch.inference_mode():
            for places in batches([len(row) for row in rows], batch_tokens):
                ids, padding = pad([rows[place] for place in places], self.padding_id)
                _, vectors = embed_padded(encoder, self.source.sentence, ids, padding)
                out[places] = vectors.to(device=out.device)
                done += sum(len(rows[place]) for place in places)
                progress(f"embedding {len(rows):,} texts", done / total)
        return out

    @property
    def padding_id(self) -> int:
        """What rows are filled with."""
        return 0 if self.source.padding_id is None else self.source.padding_id

    def check_lengths(self, rows: Sequence[Tensor]) -> None:
        """Raise `InputError` if a row of ids is longer than the encoder reads."""
        check_lengths([len(row) for row in rows], self.source.encoder.config.max_tokens, self.source.name)

    def _encoder(self, dtype: torch.dtype) -> Encoder:
        """The encoder in some precision, kept for the next call as long as its weights are as they were."""
        encoder = self.source.encoder
        if next(encoder.parameters()).dtype == dtype:
            return encoder
        state = [(weight.data_ptr(), weight._version) for weight in encoder.parameters()]
        kept, own = self._encoders.get(dtype, (None, encoder))
        if kept != state:
            own = copy.deepcopy(encoder).to(dtype)
            self._encoders[dtype] = state, own
        return own


def embed_padded(encoder: Encoder, sentence: Sentence, ids: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of tokens (rows, tokens, dim) and of rows, float32 (rows, dim), from ids and padding (rows, tokens)."""
    device = next(encoder.parameters()).device
    # no mask at all where nothing is padded: dense attention is then free to take its fastest kernel
    mask = padding_mask.to(device) if bool(padding_mask.any()) else None
    hidden = encoder(ids.to(device), padding_mask=mask)
    return hidden, pooled(hidden.float(), mask, sentence)
