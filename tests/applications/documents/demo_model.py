"""A model of the real kind, small and random, in a folder as training leaves it; and a document for it."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from trilevel.applications.documents.checkpoint import save_run
from trilevel.applications.documents.model import DocumentConfig, DocumentModel
from trilevel.applications.documents.tokenizer import train_tokenizer
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.data.documents import Document
from trilevel.model.config import EncoderConfig
from trilevel.model.focus import Focus

WORDS = [
    "attention",
    "window",
    "region",
    "summary",
    "token",
    "layer",
    "head",
    "value",
    "key",
    "query",
    "mask",
    "segment",
    "level",
    "sum",
    "mean",
    "score",
]


def document(num_sentences: int = 60, *, abstract: str = "") -> Document:
    rng = random.Random(7)
    lines = []
    for number in range(num_sentences):
        if number % 12 == 0:
            lines.append(f"# Part {number // 12}")
        words = [rng.choice(WORDS) for _ in range(rng.randrange(5, 15))]
        lines.append(" ".join(words).capitalize() + ".")
    return Document(id="doc", title="Of attention", text="\n".join(lines), abstract=abstract)


def save_small_model(folder: Path, *, has_focus: bool = True) -> Path:
    tokenizer = train_tokenizer([document().text] * 3, vocab_size=300)
    levels = Levels(ratio=LevelRatio(2, 1, 1), window=9, region_size=16, num_global_tokens=5)
    tokens = EncoderConfig(
        vocab_size=tokenizer.vocab_size,
        dim=32,
        num_heads=4,
        num_layers=2,
        levels=levels,
        focus=Focus(after_layer=1, fraction=0.5) if has_focus else None,
    )
    unit_levels = Levels(ratio=LevelRatio(2, 1, 1), window=5, region_size=4, num_global_tokens=3)
    model = DocumentModel(DocumentConfig(tokens=tokens, unit_layers=1, unit_levels=unit_levels))
    torch.nn.init.normal_(model.score.weight)
    save_run(folder, model, tokenizer)
    return folder
