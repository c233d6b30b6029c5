"""Text encoders as something to compress: no labels, the float model teaches, quality is the cosine to its vectors."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.applications.documents.builtin import builtin_document
from trilevel.compression.distill import Outputs
from trilevel.conversion.converted import REPORT_FILE, read_converted, save_converted
from trilevel.conversion.embed import pooled
from trilevel.conversion.fit import DistillBatches
from trilevel.conversion.load import load_encoder
from trilevel.conversion.sequences import MIN_TOKENS, check_text, pad, pieces, split_off
from trilevel.conversion.source import Source
from trilevel.data.documents import load_jsonl, read_file
from trilevel.errors import ConfigError, InputError
from trilevel.model.config import from_mapping
from trilevel.model.encoder import Encoder
from trilevel.model.folder import CONFIG_FILE

NUM_HELD_OUT, NUM_PIECES, NUM_CALIBRATION = 32, 2_000, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The table `data` of a plan: texts a batch, and the longest ones that are learned from."""

    batch_size: int = 8
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        if self.batch_size < 1 or self.max_tokens < MIN_TOKENS:
            raise ConfigError(
                f"batch_size={self.batch_size} must be >= 1 and max_tokens={self.max_tokens} >= {MIN_TOKENS}."
            )


class EmbeddingTask:
    """See `CompressionTask`."""

    kind = "embedding"
    metric = "cosine"
    has_labels = False

    def __init__(self, source: Source, texts: Sequence[str], settings: DataConfig, *, limit: int | None = None) -> None:
        check_text(source)
        self.source, self.model, self.settings = source, source.encoder, settings
        longest = min(source.sentence.max_tokens or source.trained_tokens, source.trained_tokens, settings.max_tokens)
        found = pieces(source, texts, max_tokens=longest, most=limit or NUM_PIECES)
        self.padding_id = 0 if source.padding_id is None else source.padding_id
        self.train, self.valid = split_off(found, min(NUM_HELD_OUT, max(1, len(found) // 4)))
        if len(self.train) < settings.batch_size:
            raise InputError(
                f"{len(self.train)} pieces of text remain to learn from; {settings.batch_size} or more are needed."
            )
        self.source_sha256, self.data_sha256 = _weights_sha256(source), _digest([*self.train, *self.valid])
        self.batches = DistillBatches(
            sequences=self.train, batch_size=settings.batch_size, padding_id=self.padding_id, seed=settings.seed
        )
        step = max(1, len(self.train) // NUM_CALIBRATION)
        chosen = [_shortened(piece, turn, source) for turn, piece in enumerate(self.train[::step][:NUM_CALIBRATION])]
        self.calibration = [self._batch([piece]) for piece in chosen]
        self.goals = [self._vectors(self.model, piece) for piece in self.valid]

    def _batch(self, sequences: Sequence[Tensor]) -> dict[str, Tensor]:
        ids, padding = pad(sequences, self.padding_id)
        return {"input_ids": ids, "padding_mask": padding}

    @torch.inference_mode()
    def _vectors(self, model: nn.Module, piece: Tensor) -> Tensor:
        vectors = self.forward(model, self._batch([piece])).vectors
        assert vectors is not None
        return vectors

    def steps_of(self, epochs: int) -> int:
        """Batches of so many epochs."""
        return max(1, epochs * len(self.train) // self.settings.batch_size)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """One vector for each text."""
        hidden, padding = model(**batch), batch["padding_mask"]
        return Outputs(vectors=pooled(hidden, padding, self.source.sentence), padding_mask=padding)

    def supervised(self, outputs: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """There are no labels."""
        raise AssertionError(self.has_labels)

    def importance(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The vectors in a random direction."""
        vectors = self.forward(model, batch).vectors
        assert vectors is not None
        # a function of the batch, so that a stage that is run again ranks alike
        generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
        return (vectors * torch.randn(vectors.shape, generator=generator)).sum(1).mean()

    def evaluate(self, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
        """Mean and lowest cosine to the float model's vectors of held-out texts."""
        found = [self._vectors(model, piece) for piece in self.valid[:limit]]
        cosines = [float(F.cosine_similarity(own, goal)) for own, goal in zip(found, self.goals, strict=False)]
        return {"cosine": sum(cosines) / len(cosines), "lowest_cosine": min(cosines), "examples": len(cosines)}

    def single(self) -> dict[str, Tensor]:
        """A text of full length."""
        return self._batch([max(self.train, key=len)])

    def check_teacher(self, teacher: nn.Module) -> None:
        """Its vectors are as long and its vocabulary is the same."""
        assert isinstance(teacher, Encoder)
        theirs, ours = teacher.config, self.model.config
        if (theirs.dim, theirs.vocab_size) != (ours.dim, ours.vocab_size):
            raise ConfigError(
                f"the teacher has (dim, vocabulary) {(theirs.dim, theirs.vocab_size)} and the model "
                f"{(ours.dim, ours.vocab_size)}; choose a teacher of the same sizes, with the same tokenizer."
            )

    def load_teacher(self, folder: str | Path) -> tuple[nn.Module, str]:
        """Another encoder."""
        source = load_encoder(folder)
        check_text(source)
        return source.encoder, _weights_sha256(source)

    def save(self, folder: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
        """Write a folder as `trilevel convert` does; other files in it stay."""
        assert isinstance(model, Encoder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as temporary:
            made = save_converted(Path(temporary) / "encoder", self.source, model, report)
            names = sorted(path.name for path in made.iterdir())
            # what says that the folder is whole comes last
            for name in [*(name for name in names if name not in (CONFIG_FILE, REPORT_FILE)), CONFIG_FILE, REPORT_FILE]:
                (made / name).replace(folder / name)

    def load(self, folder: Path) -> nn.Module:
        """The encoder of a folder."""
        return read_converted(folder).encoder


def load_task(
    name_or_path: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> EmbeddingTask:
    """An encoder with texts of a file (txt, md, rst, html, pdf, jsonl), or the built-in one.

    Raises:
        InputError: the encoder reads images, or there is too little text.
        CheckpointError, ConfigError: as `load_encoder` and the options say.
    """
    settings = from_mapping(DataConfig, options or {})
    return EmbeddingTask(load_encoder(name_or_path), _texts(data), settings, limit=limit)


def _texts(path: str | Path | None) -> list[str]:
    if path is None:
        return [builtin_document().text]
    path = Path(path)
    if ".jsonl" not in path.suffixes[-2:]:
        return [read_file(path).text]
    documents = load_jsonl(path)
    # rows kept for validation and tests are not looked at
    return [document.text for document in documents if document.split == "train"] or [d.text for d in documents]


def _shortened(piece: Tensor, turn: int, source: Source) -> Tensor:
    """Every second piece as it is, the others a half, a quarter, an eighth: ranges hold for short texts too."""
    behind = source.tokenizer.num_special_tokens_to_add(False) // 2
    kept = max(MIN_TOKENS, len(piece) >> (turn // 2 % 3 + 1)) if turn % 2 else len(piece)
    if kept >= len(piece):
        return piece
    return torch.cat([piece[: kept - behind], piece[len(piece) - behind :]])


def _weights_sha256(source: Source) -> str:
    """Of the encoder as it is: a converted one keeps the hash of its original in `sha256`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(source.encoder.state_dict().items()):
        digest.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(sequences: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(sequence.numpy().tobytes() + b"|")
    return digest.hexdigest()
