"""Training: a recipe (TOML) names the values, `train` fits an encoder and a linear map to the user's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilevel.applications.classification.batches import TextBatches, encode
from trilevel.applications.classification.checkpoint import Origin, Run, prepare_run, saved_config
from trilevel.applications.classification.data import Columns, Data, check_classes, load_data
from trilevel.applications.classification.model import ClassifierConfig, from_source
from trilevel.applications.classification.score import logits_of
from trilevel.conversion.load import load_encoder
from trilevel.errors import ConfigError
from trilevel.model.config import from_mapping
from trilevel.model.folder import sha256_of
from trilevel.training.config import TrainConfig
from trilevel.training.loop import FitResult, fit
from trilevel.training.objectives import sequence_loss
from trilevel.training.recipe import read_tables, train_config

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
NUM_VALIDATION_ROWS = 512
"""Rows that are looked at with each checkpoint."""


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number >= 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How rows are split and batched.

    Args:
        valid_fraction: share that is held out where the file does not say.
        batch_size: most rows of a batch.
        max_batch_tokens: most padded tokens of a batch; it bounds the memory. A longer text is a batch of its own.
        seed: of the order.
    """

    valid_fraction: float = 0.1
    batch_size: int = 32
    max_batch_tokens: int = 8_192
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value that `load_data` does not."""
        for name in ("batch_size", "max_batch_tokens"):
            _check_count(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Dropout before the linear map, and how much faster than the encoder that learns; see `ClassifierConfig`."""

    dropout: float = 0.1
    head_rate: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Passes over the training rows, or steps if given; the share of the steps in which the rate grows."""

    epochs: int = 3
    steps: int | None = None
    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Check every value."""
        _check_count("epochs", self.epochs)
        if self.steps is not None:
            _check_count("steps", self.steps)
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"schedule: warmup_fraction={self.warmup_fraction} must lie in [0, 1).")


def _default_train() -> TrainConfig:
    return TrainConfig(
        steps=1, learning_rate=1e-4, final_fraction=0.0, weight_decay=0.01, betas=(0.9, 0.999), checkpoint_every=100
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a classifier is trained; `train.steps` and `train.warmup_steps` follow from `schedule`."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    schedule: Schedule = Schedule()
    train: TrainConfig = field(default_factory=_default_train)


def load_recipe(path: str | Path | None = None) -> Recipe:
    """Read a recipe file; what it leaves out, and everything without a file, is `Recipe()`'s.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, a value is out of range.
    """
    if path is None:
        return Recipe()
    path = Path(path)
    parts: dict[str, Any] = {"data": DataConfig, "model": ModelConfig, "schedule": Schedule}
    values = read_tables(path, [*parts, "train"])
    made = {name: from_mapping(parts[name], values[name]) for name in parts if name in values}
    return Recipe(**made, train=train_config(_default_train(), values.get("train", {}), path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training made.

    Attributes:
        run: the model and what belongs to it.
        fit: steps, loss, seconds.
        data: the rows.
    """

    run: Run
    fit: FitResult
    data: Data


Told = Callable[[Data, int], None]
"""Told the data, and how many training rows are longer than the model reads, before training starts."""


def train(
    path: str | Path,
    columns: Columns,
    *,
    out_dir: str | Path,
    encoder: str | Path = DEFAULT_ENCODER,
    recipe: Recipe | None = None,
    max_tokens: int | None = None,
    limit: int | None = None,
    on_start: Told = lambda _data, _num_cut: None,
    show_progress: bool = True,
) -> Trained:
    """Fine-tune an encoder on the rows of a table and write `out_dir`; a run that was stopped goes on.

    Args:
        path: CSV, TSV or JSONL, see `read_table`.
        columns: which hold text, label and split.
        out_dir: folder of the run.
        encoder: whatever `load_encoder` takes.
        recipe: how.
        max_tokens: of a text; default: what the encoder was trained for.
        limit: rows of each split, for a try.
        on_start: see `Told`.
        show_progress: draw a bar on standard error.

    Raises:
        InputError: the data cannot be used.
        ConfigError: a value is out of range, or `out_dir` holds another run.
        CheckpointError: the encoder cannot be loaded, or the run cannot be written.
        TrainingInterrupted: the user stopped; the same call goes on.
    """
    path, out_dir, recipe = Path(path), Path(out_dir), recipe or Recipe()
    data = load_data(path, columns, valid_fraction=recipe.data.valid_fraction, limit=limit)
    check_classes(data, path)
    source = load_encoder(encoder)
    torch.manual_seed(recipe.train.seed)
    model = from_source(
        source,
        data.labels,
        max_tokens=max_tokens,
        dropout=recipe.model.dropout,
        head_rate=recipe.model.head_rate,
    )
    origin = Origin(
        encoder=str(encoder),
        encoder_sha256=source.sha256,
        path=str(path.resolve()),
        sha256=sha256_of(path),
        columns=columns,
        valid_fraction=recipe.data.valid_fraction,
        limit=limit,
    )
    config = saved_config(model, source.tokenizer.to_str(), origin, asdict(recipe.data))
    prepare_run(out_dir, source, config)

    sequences, labels, num_cut = _tensors(data, "train", None, source.tokenizer, model.config)
    on_start(data, num_cut)
    batches = TextBatches(
        sequences,
        labels,
        batch_size=recipe.data.batch_size,
        max_batch_tokens=recipe.data.max_batch_tokens,
        padding_id=model.config.padding_id,
        seed=recipe.data.seed,
    )
    held_out, truth, _ = _tensors(data, "valid", NUM_VALIDATION_ROWS, source.tokenizer, model.config)
    result = fit(
        model,
        batches,
        _objective,
        config=_planned(recipe, batches),
        out_dir=out_dir,
        model_config=config,
        evaluate=_validation(held_out, torch.tensor(truth)),
        show_progress=show_progress,
    )
    run = Run(
        folder=out_dir,
        model=model.eval(),
        tokenizer=source.tokenizer,
        origin=origin,
        step=result.step,
        steps=result.step,
    )
    return Trained(run=run, fit=result, data=data)


def _tensors(
    data: Data, split: str, limit: int | None, tokenizer: Any, config: ClassifierConfig
) -> tuple[list[Tensor], list[int], int]:
    """Token ids and places of the labels of a split, and how many texts are longer than the model reads."""
    examples = data.examples[split][:limit]
    places = {label: place for place, label in enumerate(data.labels)}
    texts = [example.text for example in examples]
    sequences, num_cut = encode(tokenizer, texts, max_tokens=config.max_tokens, padding_id=config.padding_id)
    return sequences, [places[example.label] for example in examples], num_cut


def _planned(recipe: Recipe, batches: TextBatches) -> TrainConfig:
    schedule = recipe.schedule
    accumulate = recipe.train.accumulate
    steps = schedule.steps or max(1, batches.steps_of(schedule.epochs) // accumulate)
    return replace(recipe.train, steps=steps, warmup_steps=int(schedule.warmup_fraction * steps))


def _objective(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    logits = model(batch["input_ids"], padding_mask=batch["padding_mask"])
    correct = (logits.argmax(-1) == batch["labels"]).float().mean()
    return {"loss": sequence_loss(logits, batch["labels"]), "accuracy": correct}


def _validation(sequences: list[Tensor], labels: Tensor) -> Callable[[nn.Module], dict[str, float]]:
    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = logits_of(model, sequences)
        return {
            "loss": float(F.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        }

    return evaluate
