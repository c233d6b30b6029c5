"""Training: a recipe (TOML) names the values, `train` runs one phase of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trilevel.applications.documents.backbone import Backbone, StoredVectors, backbone_of
from trilevel.applications.documents.checkpoint import (
    ENCODER_FOLDER,
    TOKENIZER_FILE,
    load_model,
    load_run,
    shipped_tokenizer,
)
from trilevel.applications.documents.data import DocumentBatches, collate, encode_corpus
from trilevel.applications.documents.encoded import Encoded
from trilevel.applications.documents.model import DocumentConfig, DocumentModel, default_config
from trilevel.applications.documents.objective import objective, oracle_loss
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.conversion.delta import save_delta_of
from trilevel.conversion.load import load_encoder
from trilevel.conversion.source import Source
from trilevel.data.documents import Document, load_jsonl
from trilevel.errors import ConfigError, InputError, require
from trilevel.model.config import from_mapping
from trilevel.training.config import TrainConfig
from trilevel.training.loop import FitResult, fit
from trilevel.training.recipe import read_tables

RECIPES = Path(__file__).parents[3] / "recipes"
DEFAULT_RECIPE = RECIPES / "documents.toml"
MINILM_RECIPE = RECIPES / "documents-minilm.toml"
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
class BackboneSize:
    """The part over units on a pretrained encoder; `bfloat16`: the encoder reads the corpus in that precision."""

    word_dim: int
    dim: int
    num_heads: int
    unit_layers: int
    dropout: float
    word_dropout: float
    bfloat16: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weight of the focus scorer's loss; share of the steps that run focused."""

    focus_weight: float
    focus_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One phase of training; `model` is a `BackboneSize` where a pretrained encoder is used (table `backbone`)."""

    data: DataConfig
    model: SizeConfig | BackboneSize
    train: TrainConfig
    objective: LossConfig


_PARTS = {
    "data": DataConfig,
    "model": SizeConfig,
    "backbone": BackboneSize,
    "train": TrainConfig,
    "objective": LossConfig,
}


def load_recipe(path: str | Path | None = None, *, phase: str | None = None) -> Recipe:
    """Read a recipe file, the repository's `recipes/documents.toml` by default; `phase` replaces what its table names.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown or missing, a value is out of range.
    """
    path = DEFAULT_RECIPE if path is None else Path(path)
    values = read_tables(path, [*_PARTS, "long"])
    phases = values.pop("long", {})
    if phase is not None:
        values = _merged(values, {"long": phases}.get(phase, {}))
    if "model" in values and "backbone" in values:
        raise ConfigError(
            f"{path} has both tables, model and backbone; a model has its own encoder or a pretrained one."
        )
    found: dict[str, Any] = {name: from_mapping(_PARTS[name], table) for name, table in values.items()}
    if "backbone" in found:
        found["model"] = found.pop("backbone")
    return from_mapping(Recipe, found)


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
    encoder: str | Path | None = None,
    is_dense: bool = False,
    start: str | Path | None = None,
    limit: int | None = None,
    show_progress: bool = True,
) -> FitResult:
    """Train one phase and write `out_dir/checkpoint`, `out_dir/log.csv` and the tokenizer or the delta; resumes.

    Args:
        recipe: of `load_recipe`.
        out_dir: the run folder.
        data_root: where the data sets lie.
        encoder: what `load_encoder` takes, for a recipe with a backbone; its vectors of the corpus are kept in the
            cache, and what conversion changed in it goes to `out_dir/encoder`.
        is_dense: the twin with dense attention: same initialisation, data order, steps and dropout.
        start: the run that this phase goes on from.
        limit: take that many documents of each split only.
        show_progress: print bars.

    Raises:
        ConfigError: the recipe needs an encoder and there is none, or the other way round.
    """
    out_dir = Path(out_dir)
    path = data_path(recipe.data.set, data_root)
    splits = [load_jsonl(path, split=split, limit=limit) for split in ("train", "valid")]
    if (encoder is None) == isinstance(recipe.model, BackboneSize):
        raise ConfigError(
            f"encoder={encoder} and the recipe's table [{'model' if encoder else 'backbone'}] do not go together: a "
            "pretrained encoder (--encoder) needs [backbone], a model with an encoder of its own [model]."
        )
    if encoder is None:
        tokenizer = shipped_tokenizer()
        model = _first_model(recipe, tokenizer, is_dense=is_dense, start=start)
        corpus, held_out = (encode_corpus(documents, tokenizer) for documents in splits)
        out_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out_dir / TOKENIZER_FILE)
    else:
        source = load_encoder(encoder)
        model = _backbone_model(recipe, source, is_dense=is_dense, start=start)
        save_delta_of(out_dir / ENCODER_FOLDER, source)
        corpus, held_out = _with_vectors(splits, recipe, source, model, show_progress=show_progress)
    return fit(
        model,
        _batches(recipe.data, corpus),
        objective(focus_weight=recipe.objective.focus_weight, focus_share=recipe.objective.focus_share),
        config=recipe.train,
        out_dir=out_dir,
        evaluate=_validation(held_out, recipe.data.max_tokens),
        show_progress=show_progress,
    )


def _batches(data: DataConfig, corpus: Sequence[Encoded]) -> DocumentBatches:
    return DocumentBatches(corpus, max_tokens=data.max_tokens, max_batch_tokens=data.max_batch_tokens, seed=data.seed)


def _first_model(
    recipe: Recipe, tokenizer: DocumentTokenizer, *, is_dense: bool, start: str | Path | None
) -> DocumentModel:
    if start is not None:
        return _started(load_run(start)[0], start, is_dense=is_dense)
    torch.manual_seed(recipe.train.seed)
    size = recipe.model
    assert isinstance(size, SizeConfig)
    config = default_config(
        tokenizer.vocab_size, num_layers=size.num_layers, dropout=size.dropout, word_dropout=size.word_dropout
    )
    model = DocumentModel(config)
    return model.dense() if is_dense else model


def _backbone_model(recipe: Recipe, source: Source, *, is_dense: bool, start: str | Path | None) -> DocumentModel:
    """The part over units alone: training needs the encoder's vectors, not the encoder."""
    if start is not None:
        return _started(load_model(start), start, is_dense=is_dense)
    torch.manual_seed(recipe.train.seed)
    size = recipe.model
    assert isinstance(size, BackboneSize)
    model = DocumentModel(
        DocumentConfig(
            tokens=backbone_of(
                source, word_dim=size.word_dim, dim=size.dim, num_heads=size.num_heads, dropout=size.dropout
            ),
            unit_layers=size.unit_layers,
            word_dropout=size.word_dropout,
        )
    )
    return model.dense() if is_dense else model


def _started(model: DocumentModel, start: str | Path, *, is_dense: bool) -> DocumentModel:
    if is_dense and not model.config.is_dense:
        raise ConfigError(f"{start} has levels; --dense with a start needs a dense run.")
    return model


def _with_vectors(
    splits: Sequence[Sequence[Document]], recipe: Recipe, source: Source, model: DocumentModel, *, show_progress: bool
) -> list[list[Encoded]]:
    """Each split with the vectors of its units."""
    assert isinstance(recipe.model, BackboneSize)
    assert isinstance(model.config.tokens, Backbone)
    tokenizer = DocumentTokenizer(source.tokenizer)
    dtype = torch.bfloat16 if recipe.model.bfloat16 else torch.float32
    stored = StoredVectors(copy.deepcopy(source.encoder).to(dtype), model.config.tokens)
    most = min(recipe.data.max_tokens, model.config.tokens.max_tokens)
    encoded = [[document.cut(most) for document in encode_corpus(documents, tokenizer)] for documents in splits]
    progress = require("rich.progress", extra="train")
    console = require("rich.console", extra="train").Console(stderr=True)
    with progress.Progress(console=console, transient=True, disable=not show_progress) as bar:
        tasks = [bar.add_task(f"vectors of {len(documents):,} documents, kept", total=1.0) for documents in encoded]
        return [
            stored.add_all(documents, partial(_show, bar, task)) for documents, task in zip(encoded, tasks, strict=True)
        ]


def _show(bar: Any, task: Any, done: float) -> None:
    bar.update(task, completed=done)


def _validation(held_out: list[Encoded], max_tokens: int) -> Any:
    """Loss over the first held-out documents; cheap enough for every checkpoint."""
    documents = [document.cut(max_tokens) for document in held_out[:NUM_VALIDATION_DOCUMENTS]]
    batches = [collate([document]) for document in documents if document.oracle.any()]

    def evaluate(model: nn.Module) -> dict[str, float]:
        losses = [float(oracle_loss(model(batch), batch)) for batch in batches]
        return {"oracle": sum(losses) / max(1, len(losses))}

    return evaluate
