"""Training: a recipe (TOML) names the values, `train` runs one phase of it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trilevel.applications.documents.checkpoint import TOKENIZER_FILE, load_run, shipped_tokenizer
from trilevel.applications.documents.data import DocumentBatches, Encoded, collate, encode_corpus
from trilevel.applications.documents.model import DocumentModel, default_config
from trilevel.applications.documents.objective import objective, oracle_loss
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.data.documents import load_jsonl
from trilevel.errors import ConfigError, InputError
from trilevel.model.config import from_mapping
from trilevel.training.config import TrainConfig
from trilevel.training.loop import FitResult, fit

DEFAULT_RECIPE = Path(__file__).parents[3] / "recipes" / "documents.toml"
NUM_VALIDATION_DOCUMENTS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which documents, how long, how many a batch."""

    set: str
    max_tokens: int
    max_batch_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeConfig:
    """What a recipe chooses of the model; the rest is `default_config`'s."""

    num_layers: int
    dropout: float
    word_dropout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weight of the focus scorer's loss; share of the steps that run focused."""

    focus_weight: float
    focus_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One phase of training."""

    data: DataConfig
    model: SizeConfig
    train: TrainConfig
    objective: LossConfig


def load_recipe(path: str | Path | None = None, *, phase: str | None = None) -> Recipe:
    """Read a recipe file, the repository's `recipes/documents.toml` by default; `phase` replaces what its table names.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown or missing, a value is out of range.
    """
    path = DEFAULT_RECIPE if path is None else Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: no recipe there ({error.strerror}). Name a TOML file with --recipe.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error}).") from error
    phases = values.pop("long", {})
    if phase is not None:
        values = _merged(values, {"long": phases}.get(phase, {}))
    parts = {"data": DataConfig, "model": SizeConfig, "train": TrainConfig, "objective": LossConfig}
    unknown = sorted(set(values) - set(parts))
    if unknown:
        raise ConfigError(f"{path}: unknown table {', '.join(unknown)}; known are {', '.join(parts)} and long.")
    return from_mapping(Recipe, {name: from_mapping(parts[name], table) for name, table in values.items()})


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = {name: dict(table) for name, table in base.items()}
    for name, table in over.items():
        merged.setdefault(name, {}).update(table)
    return merged


def data_path(name: str, root: str | Path | None = None) -> Path:
    """Where a data set lies: below `root`, else below the folder that TRILEVEL_DATA names.

    Raises:
        InputError: neither is given.
    """
    root = root or os.environ.get("TRILEVEL_DATA")
    if not root:
        raise InputError(
            f"{name}: where the data lies is not known. Set TRILEVEL_DATA or give --data with the folder that holds it."
        )
    return Path(root) / name


def train(
    recipe: Recipe,
    *,
    out_dir: str | Path,
    data_root: str | Path | None = None,
    is_dense: bool = False,
    start: str | Path | None = None,
    limit: int | None = None,
    show_progress: bool = True,
) -> FitResult:
    """Train one phase and write `out_dir/checkpoint`, `out_dir/tokenizer.json` and `out_dir/log.csv`; resumes.

    `is_dense` trains the twin with dense attention: same initialisation, data order, steps and dropout. `start` is the
    run that this phase goes on from. `limit` takes that many documents of each split only.
    """
    out_dir = Path(out_dir)
    tokenizer = shipped_tokenizer()
    model = _first_model(recipe, tokenizer, is_dense=is_dense, start=start)
    path = data_path(recipe.data.set, data_root)
    corpus = encode_corpus(load_jsonl(path, split="train", limit=limit), tokenizer)
    held_out = encode_corpus(load_jsonl(path, split="valid", limit=limit), tokenizer)
    batches = DocumentBatches(
        corpus,
        max_tokens=recipe.data.max_tokens,
        max_batch_tokens=recipe.data.max_batch_tokens,
        seed=recipe.data.seed,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out_dir / TOKENIZER_FILE)
    return fit(
        model,
        batches,
        objective(focus_weight=recipe.objective.focus_weight, focus_share=recipe.objective.focus_share),
        config=recipe.train,
        out_dir=out_dir,
        evaluate=_validation(held_out, recipe.data.max_tokens),
        show_progress=show_progress,
    )


def _first_model(
    recipe: Recipe, tokenizer: DocumentTokenizer, *, is_dense: bool, start: str | Path | None
) -> DocumentModel:
    if start is not None:
        model = load_run(start)[0]
        if is_dense and not model.config.is_dense:
            raise ConfigError(f"{start} has levels; --dense with a start needs a dense run.")
        return model
    torch.manual_seed(recipe.train.seed)
    size = recipe.model
    config = default_config(
        tokenizer.vocab_size, num_layers=size.num_layers, dropout=size.dropout, word_dropout=size.word_dropout
    )
    model = DocumentModel(config)
    return model.dense() if is_dense else model


def _validation(held_out: list[Encoded], max_tokens: int) -> Any:
    """Loss over the first held-out documents; cheap enough for every checkpoint."""
    documents = [document.cut(max_tokens) for document in held_out[:NUM_VALIDATION_DOCUMENTS]]
    batches = [collate([document]) for document in documents if document.oracle.any()]

    def evaluate(model: nn.Module) -> dict[str, float]:
        losses = [float(oracle_loss(model(batch), batch)) for batch in batches]
        return {"oracle": sum(losses) / max(1, len(losses))}

    return evaluate
