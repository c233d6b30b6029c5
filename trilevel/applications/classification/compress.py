"""Text classifiers as something to compress: rows of the run's own table, accuracy on its validation split."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.applications.classification.batches import TextBatches, cut, encode
from trilevel.applications.classification.checkpoint import (
    CHECKPOINT_FOLDER,
    TOKENIZER_FILE,
    Run,
    load_run,
    saved_config,
)
from trilevel.applications.classification.data import Data, check_classes, check_labels, load_data
from trilevel.applications.classification.score import logits_of
from trilevel.compression.distill import Outputs, outputs_of
from trilevel.compression.written import write_json
from trilevel.conversion.sequences import pad
from trilevel.errors import ConfigError, InputError
from trilevel.model.checkpoint import save_checkpoint, weights_sha256
from trilevel.model.config import from_mapping
from trilevel.model.folder import sha256_of
from trilevel.training.objectives import sequence_loss

NUM_CALIBRATION_TEXTS, CALIBRATION_BATCH = 256, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The table `data` of a plan, as in the recipe of `trilevel train classification`."""

    batch_size: int = 32
    max_batch_tokens: int = 8_192
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        if self.batch_size < 1 or self.max_batch_tokens < 1:
            raise ConfigError(
                f"batch_size={self.batch_size} and max_batch_tokens={self.max_batch_tokens} must be >= 1."
            )


class ClassificationTask:
    """See `CompressionTask`."""

    kind = "classification"
    metric = "accuracy"
    has_labels = True

    def __init__(self, run: Run, data: Data, settings: DataConfig) -> None:
        self.run, self.model, self.settings = run, run.model, settings
        self.source_sha256, self.data_sha256 = weights_sha256(run.folder / CHECKPOINT_FOLDER), _digest(data)
        self.texts = {split: self._tensors(data, split) for split in ("train", "valid")}
        sequences, labels = self.texts["train"]
        self.batches = TextBatches(sequences, labels, padding_id=run.model.config.padding_id, **asdict(settings))
        rows = list(range(min(NUM_CALIBRATION_TEXTS, len(sequences))))
        lengths = [len(sequence) for sequence in sequences]
        plan = cut(
            sorted(rows, key=lengths.__getitem__),
            lengths,
            batch_size=CALIBRATION_BATCH,
            max_batch_tokens=settings.max_batch_tokens,
        )
        self.calibration = [self._batch(chosen) for chosen in plan]

    def _tensors(self, data: Data, split: str) -> tuple[list[Tensor], list[int]]:
        config, examples = self.run.model.config, data.examples[split]
        texts = [example.text for example in examples]
        found, _ = encode(self.run.tokenizer, texts, max_tokens=config.max_tokens, padding_id=config.padding_id)
        return found, [config.labels.index(example.label) for example in examples]

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        sequences, labels = self.texts["train"]
        ids, padding = pad([sequences[row] for row in rows], self.run.model.config.padding_id)
        return {"input_ids": ids, "padding_mask": padding, "labels": torch.tensor([labels[row] for row in rows])}

    def steps_of(self, epochs: int) -> int:
        """Batches of so many epochs."""
        return self.batches.steps_of(epochs)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """Logits of the classes, of inner heads too."""
        padding = batch["padding_mask"]
        return outputs_of(model(batch["input_ids"], padding_mask=padding, return_exits=True), padding_mask=padding)

    def supervised(self, outputs: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross entropy and accuracy."""
        assert outputs.logits is not None
        correct = (outputs.logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": sequence_loss(outputs.logits, batch["labels"]), "accuracy": correct}

    def importance(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The cross entropy."""
        return self.supervised(self.forward(model, batch), batch)["loss"]

    def evaluate(self, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
        """Accuracy and log loss on validation rows."""
        sequences, truth = self.texts["valid"][0][:limit], self.texts["valid"][1][:limit]
        logits, labels = logits_of(model, sequences), torch.tensor(truth)
        correct = (logits.argmax(-1) == labels).double().mean()
        return {"accuracy": float(correct), "log_loss": float(sequence_loss(logits, labels)), "examples": len(truth)}

    def single(self) -> dict[str, Tensor]:
        """A text of median length."""
        sequences, _ = self.texts["train"]
        rows = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
        return self._batch([rows[len(rows) // 2]])

    def check_teacher(self, teacher: nn.Module) -> None:
        """The classes are the same, and the vocabulary."""
        assert isinstance(teacher, type(self.model))
        ours, theirs = self.model.config, teacher.config
        if ours.labels != theirs.labels or ours.encoder.vocab_size != theirs.encoder.vocab_size:
            raise ConfigError(
                f"the teacher has the classes {theirs.labels} and {theirs.encoder.vocab_size} tokens, the model "
                f"{ours.labels} and {ours.encoder.vocab_size}; choose a teacher with the same tokenizer and classes."
            )

    def load_teacher(self, folder: str | Path) -> tuple[nn.Module, str]:
        """The model of another run."""
        run = load_run(folder)
        if run.tokenizer.to_str() != self.run.tokenizer.to_str():
            raise ConfigError(
                f"{run.folder} has another tokenizer than {self.run.folder}; choose a teacher with the same."
            )
        return run.model, weights_sha256(run.folder / CHECKPOINT_FOLDER)

    def save(self, folder: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
        """Write a run."""
        text = self.run.tokenizer.to_str()
        batching = {"valid_fraction": self.run.origin.valid_fraction} | asdict(self.settings)
        config = saved_config(model, text, self.run.origin, batching)  # type: ignore[arg-type]  # pruned or quantized
        # the bytes whose hash the source's checkpoint has
        shutil.copyfile(self.run.folder / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        config["tokenizer_sha256"] = sha256_of(folder / TOKENIZER_FILE)
        state = {"step": self.run.step, "course": {"steps": self.run.steps}}
        save_checkpoint(folder / CHECKPOINT_FOLDER, model=model, config=config, state=state)
        write_json(folder / "report.json", report)

    def load(self, folder: Path) -> nn.Module:
        """The model of a run."""
        return load_run(folder).model


def load_task(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> ClassificationTask:
    """A run with the table it was trained on, or another with the same columns.

    Raises:
        InputError: the table is no longer there, cannot be read, or has a label that the model does not know.
        CheckpointError, ConfigError: as `load_run` and the options say.
    """
    run, settings = load_run(folder), from_mapping(DataConfig, options or {})
    origin = run.origin
    path = Path(origin.path if data is None else data)
    if data is None and not path.is_file():
        raise InputError(f"{path}, which {folder} was trained on, is no longer there. Name the table with --data.")
    found = load_data(
        path,
        origin.columns,
        valid_fraction=origin.valid_fraction,
        limit=origin.limit if limit is None else limit,
    )
    check_classes(found, path)
    for split in ("train", "valid"):
        check_labels(found.examples[split], run.labels, path)
    return ClassificationTask(run, found, settings)


def _digest(data: Data) -> str:
    digest = hashlib.sha256()
    for split in ("train", "valid"):
        for example in data.examples[split]:
            digest.update(repr((split, example.label, example.text)).encode())
    return digest.hexdigest()
