"""Document models as something to compress: ROUGE on validation documents, or the same choice on built-in text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilevel.applications.documents.backbone import Backbone
from trilevel.applications.documents.builtin import builtin_pieces
from trilevel.applications.documents.checkpoint import CHECKPOINT_FOLDER, load_run, save_run
from trilevel.applications.documents.data import DocumentBatch, DocumentBatches, collate, encode_corpus
from trilevel.applications.documents.encoded import Encoded
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.objective import oracle_loss
from trilevel.applications.documents.rouge import rouge
from trilevel.applications.documents.select import Selection
from trilevel.applications.documents.summarize import score_units
from trilevel.applications.documents.summary import DEFAULT_BUDGET_WORDS, choose_units
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import Unit, split_units
from trilevel.compression.distill import Outputs
from trilevel.compression.written import write_json
from trilevel.data.documents import Document, load_jsonl
from trilevel.data.places import data_path
from trilevel.errors import ConfigError, InputError
from trilevel.model.checkpoint import weights_sha256
from trilevel.model.config import from_mapping

NUM_CALIBRATION_DOCUMENTS, NUM_VALIDATION_DOCUMENTS, NUM_TRAINING_DOCUMENTS = 32, 64, 4_000
FOCUS_WEIGHT = 0.2
"""Of the loss of the scores that thin a document out, as in recipes/documents.toml."""
# instead of minus infinity: a softmax gives such units nothing and no difference of two is NaN
_OUT = -1e4
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The table `data` of a plan, as in the recipe of `trilevel train documents`."""

    max_tokens: int = 2_048
    max_batch_tokens: int = 8_192
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    document: Document
    units: list[Unit]
    encoded: Encoded


class DocumentTask:
    """See `CompressionTask`. `agreement` is the mean share of sentences that this and the source model both choose."""

    kind = "documents"

    def __init__(
        self, folder: Path, model: DocumentModel, tokenizer: DocumentTokenizer, splits: Sequence[Sequence[Document]],
        settings: DataConfig, progress: Progress,
    ) -> None:  # fmt: skip
        self.tokenizer, self.settings = tokenizer, settings
        # hiding words is noise as dropout is; a model that learns from a teacher does without
        model.config = replace(model.config, word_dropout=0.0)
        self.model = model
        self.source_sha256, self.data_sha256 = weights_sha256(folder / CHECKPOINT_FOLDER), _digest(splits)
        train, valid = (self._cases(documents, progress) for documents in splits)
        self.has_labels = all(case.encoded.oracle.any() for case in valid)
        self.metric = "rouge1" if self.has_labels else "agreement"
        documents = [case.encoded for case in train]
        self.batches: DocumentBatches | _Unlabelled = (
            DocumentBatches(
                documents,
                max_tokens=settings.max_tokens,
                max_batch_tokens=settings.max_batch_tokens,
                seed=settings.seed,
            )
            if self.has_labels
            else _Unlabelled([document.cut(settings.max_tokens) for document in documents], settings.seed)
        )
        usable = [document.cut(settings.max_tokens) for document in documents]
        if self.has_labels:
            usable = [document for document in usable if document.oracle.any()]
        self.calibration = [collate([document]) for document in usable[:NUM_CALIBRATION_DOCUMENTS]]
        self.valid = valid
        self._chosen = [self._choice(self.model, case) for case in valid]

    def _cases(self, documents: Sequence[Document], progress: Progress) -> list[_Case]:
        progress(f"reading {len(documents):,} documents", 0.0)
        pairs = zip(documents, encode_corpus(documents, self.tokenizer), strict=True)
        longest = self.model.config.max_tokens
        return [_Case(document=own, units=split_units(own), encoded=arrays.cut(longest)) for own, arrays in pairs]

    def _choice(self, model: nn.Module, case: _Case) -> list[int]:
        scores = score_units(model, case.encoded)  # type: ignore[arg-type]  # a pruned or quantized one
        return choose_units(case.units, scores, case.encoded, Selection(words=DEFAULT_BUDGET_WORDS))

    def steps_of(self, epochs: int) -> int:
        """Batches of so many epochs, roughly."""
        return epochs * self.batches.steps_per_epoch

    def forward(self, model: nn.Module, batch: DocumentBatch) -> Outputs:
        """Scores of the units, those that no summary may use put out."""
        if self.model.config.focus is None:
            scores, focus = model(batch), None
        else:
            scores, focus = model(batch, focus_fraction=1.0, with_focus_scores=True)
        logits = scores.masked_fill(~batch["unit_selectable"], _OUT)
        return Outputs(logits=logits, padding_mask=batch["padding_mask"], focus=focus)

    def supervised(self, outputs: Outputs, batch: DocumentBatch) -> dict[str, Tensor]:
        """The loss of training."""
        assert outputs.logits is not None
        oracle = oracle_loss(outputs.logits, batch)
        if outputs.focus is None:
            return {"loss": oracle, "oracle": oracle}
        focus = oracle_loss(outputs.focus, batch)
        return {"loss": oracle + FOCUS_WEIGHT * focus, "oracle": oracle, "focus": focus}

    def importance(self, model: nn.Module, batch: DocumentBatch) -> Tensor:
        """The loss of the labels; without any, the scores in a random direction."""
        outputs = self.forward(model, batch)
        if self.has_labels:
            return self.supervised(outputs, batch)["loss"]
        assert outputs.logits is not None
        # a function of the batch, so that a stage that is run again ranks alike
        generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
        direction = torch.randn(outputs.logits.shape, generator=generator)
        return (outputs.logits * direction.masked_fill(~batch["unit_selectable"], 0.0)).sum(1).mean()

    def evaluate(self, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
        """ROUGE-1 F1, 0 to 1, where there are abstracts, and agreement."""
        cases = self.valid[:limit]
        chosen = [self._choice(model, case) for case in cases]
        pairs = [(set(own), set(other)) for own, other in zip(chosen, self._chosen, strict=False)]
        found = {"agreement": float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))}
        if self.has_labels:
            scores = [
                rouge(case.document.abstract, [case.units[place].text for place in own])[0] / 100
                for case, own in zip(cases, chosen, strict=True)
            ]
            found["rouge1"] = float(np.mean(scores))
        return found | {"examples": len(cases)}

    def single(self) -> DocumentBatch:
        """A document of median length, cut as for training."""
        order = sorted(self.calibration, key=lambda batch: batch["input_ids"].shape[1])
        return order[len(order) // 2]

    def check_teacher(self, teacher: nn.Module) -> None:
        """The vocabulary is the same."""
        assert isinstance(teacher, DocumentModel)
        theirs, ours = teacher.config.tokens, self.model.config.tokens
        vocab = getattr(theirs, "vocab_size", None), getattr(ours, "vocab_size", None)
        if vocab[0] != vocab[1] or (teacher.config.focus is None) != (self.model.config.focus is None):
            raise ConfigError(
                f"the teacher has {vocab[0]} tokens and the model {vocab[1]}, and both must have a focus or none; "
                "choose a teacher that was trained alike."
            )

    def load_teacher(self, folder: str | Path) -> tuple[nn.Module, str]:
        """The model of another run."""
        return load_run(folder)[0], weights_sha256(Path(folder) / CHECKPOINT_FOLDER)

    def save(self, folder: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
        """Write a run."""
        save_run(folder, model, self.tokenizer)  # type: ignore[arg-type]  # a pruned or quantized one
        write_json(folder / "report.json", report)

    def load(self, folder: Path) -> nn.Module:
        """The model of a run."""
        return load_run(folder)[0]


class _Unlabelled:
    """Batches of two documents, as they come in each epoch's order."""

    def __init__(self, documents: Sequence[Encoded], seed: int) -> None:
        self._documents, self._seed = documents, seed

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self._documents) // 2)

    def batch(self, step: int) -> DocumentBatch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._documents))
        return collate([self._documents[i] for i in order[2 * place : 2 * place + 2]])


def load_task(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = lambda _what, _done: None,
) -> DocumentTask:
    """A run with labelled documents of a `.jsonl` or `.jsonl.xz` with the splits train and valid, or the built-in text.

    Raises:
        InputError: the documents cannot be read.
        ConfigError: the model stands on a pretrained encoder, or the options are unknown.
        CheckpointError: as `load_run`.
    """
    model, tokenizer = load_run(folder)
    if isinstance(model.config.tokens, Backbone):
        raise ConfigError(
            f"{folder} stands on a pretrained encoder, which is no part of the run. Compress a model with an "
            "encoder of its own, or the encoder with `trilevel compress ENCODER`."
        )
    settings = from_mapping(DataConfig, options or {})
    if data is None:
        splits = _builtin(limit)
    else:
        sizes = {"train": limit or NUM_TRAINING_DOCUMENTS, "valid": limit or NUM_VALIDATION_DOCUMENTS}
        splits = [load_jsonl(data_path(data), split=split, limit=count) for split, count in sizes.items()]
        if not all(document.abstract for documents in splits for document in documents):
            raise InputError(
                f"{data}: every document needs an abstract to be judged by; leave --data out to do without."
            )
    return DocumentTask(Path(folder), model, tokenizer, splits, settings, progress)


def _builtin(limit: int | None) -> list[list[Document]]:
    """Pieces of the built-in document, every fourth held out."""
    made = builtin_pieces()
    held = made[::4]
    return [[piece for piece in made if piece not in held][:limit], held[:limit]]


def _digest(splits: Sequence[Sequence[Document]]) -> str:
    digest = hashlib.sha256()
    for documents in splits:
        for document in documents:
            digest.update(repr((document.title, document.text, document.abstract)).encode())
        digest.update(b"|")
    return digest.hexdigest()
