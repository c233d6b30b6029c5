"""Where a document model and its tokenizer lie: a run folder with `checkpoint/` and `tokenizer.json`.

A model on a pretrained encoder has `encoder/` in place of the tokenizer: which encoder, and what conversion changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from trilevel.applications.documents.backbone import Backbone
from trilevel.applications.documents.model import DocumentConfig, DocumentModel
from trilevel.applications.documents.pretrained_encoder import load_pretrained
from trilevel.applications.documents.tokenizer import DocumentTokenizer, load_tokenizer
from trilevel.compression.checkpoint import load_compressed
from trilevel.errors import CheckpointError, ConfigError
from trilevel.model.checkpoint import read_config, save_checkpoint

PRETRAINED = Path(__file__).parent / "pretrained"
MINILM = Path(__file__).parent / "pretrained-minilm"
CHECKPOINT_FOLDER = "checkpoint"
ENCODER_FOLDER = "encoder"
TOKENIZER_FILE = "tokenizer.json"


def load_run(
    path: str | Path | None = None, *, tell: Callable[[str], None] = lambda _message: None
) -> tuple[DocumentModel, DocumentTokenizer]:
    """The model, in evaluation mode, and its tokenizer; None is the shipped model.

    `path` is a folder that `trilevel train documents` wrote, or `MINILM`, the shipped model on a converted MiniLM. The
    encoder of such a model is made on first use and kept in the cache; `tell` is told so.

    Raises:
        CheckpointError: a file is missing, has a wrong hash or shape, or an unknown configuration; or the pretrained
            encoder cannot be had.
    """
    folder = PRETRAINED if path is None else Path(path)
    model = load_model(folder)
    if isinstance(model.config.tokens, Backbone):
        source = load_pretrained(folder / ENCODER_FOLDER, tell)
        return model.attach(source.encoder), DocumentTokenizer(source.tokenizer)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.vocab_size != model.config.tokens.vocab_size:
        raise CheckpointError(
            f"{folder}: {tokenizer.vocab_size} tokens in the tokenizer, {model.config.tokens.vocab_size} in the model. "
            "Use the tokenizer the model was trained with."
        )
    return model, tokenizer


def load_model(path: str | Path | None = None) -> DocumentModel:
    """The model of a run folder, in evaluation mode, without the pretrained encoder; None is the shipped model."""
    folder = (PRETRAINED if path is None else Path(path)) / CHECKPOINT_FOLDER
    try:
        model = DocumentModel(DocumentConfig.from_dict(read_config(folder)))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its configuration is not understood: {error}") from error
    return load_compressed(folder, model)[0].eval()


def shipped_tokenizer() -> DocumentTokenizer:
    """The tokenizer that every model of this project shares."""
    return load_tokenizer(PRETRAINED / TOKENIZER_FILE)


def ship_run(run: str | Path, path: str | Path) -> None:
    """Copy a run on a pretrained encoder without optimizer, log and pretrained weights: what is shipped."""
    model = load_model(run)
    save_checkpoint(Path(path) / CHECKPOINT_FOLDER, model=model, config=model.config.to_dict())
    shutil.copytree(Path(run) / ENCODER_FOLDER, Path(path) / ENCODER_FOLDER, dirs_exist_ok=True)


def save_run(path: str | Path, model: DocumentModel, tokenizer: DocumentTokenizer) -> None:
    """Write weights and tokenizer of a model with an encoder of its own, without optimizer: what is shipped."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / CHECKPOINT_FOLDER, model=model, config=model.config.to_dict())
    tokenizer.save(folder / TOKENIZER_FILE)
