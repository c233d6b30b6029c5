"""A tiny encoder as a folder of `trilevel convert`, and rows that a handful of steps learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch

from trilevel.applications.classification.data import Columns
from trilevel.applications.classification.recipe import DataConfig, ModelConfig, Recipe, Schedule, Trained, train
from trilevel.attention.levels import Levels
from trilevel.conversion.converted import save_converted
from trilevel.conversion.sentence import Pooling, Sentence
from trilevel.conversion.source import Source
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder
from trilevel.training.config import TrainConfig

GOOD, BAD = ("fine", "lovely", "bright"), ("dull", "dreadful", "weak")
FILLER = tuple(f"w{number}" for number in range(23))
NAMES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER]
LEVELS = Levels(window=3, region_size=2, num_global_tokens=2)
TRAINED_TOKENS = 19
STEPS = 90
COLUMNS = Columns(text="text", label="label")
RECIPE = Recipe(
    data=DataConfig(batch_size=8, valid_fraction=0.2),
    model=ModelConfig(dropout=0.1),
    schedule=Schedule(steps=STEPS),
    train=TrainConfig(steps=1, learning_rate=1e-2, final_fraction=0.0),
)


def make_tokenizer(*, has_marks: bool = True) -> Any:
    vocabulary = {name: index for index, name in enumerate(NAMES)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(NAMES[:4])
    if has_marks:
        made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def make_source(*, levels: Levels | None = LEVELS, pooling: Pooling = "mean", seed: int = 0, dim: int = 30) -> Source:
    torch.manual_seed(seed)
    config = EncoderConfig(
        vocab_size=len(NAMES), dim=dim, num_heads=5, num_layers=2, ffn_dim=29, levels=levels, dropout=0.1, max_tokens=97
    )
    return Source(
        name="tiny",
        folder=Path("tiny"),
        family="bert",
        config={},
        encoder=Encoder(config).eval(),
        tokenizer=make_tokenizer(),
        padding_id=0,
        special_tokens={"pad_token": 0},
        trained_tokens=TRAINED_TOKENS,
        sentence=Sentence(pooling=pooling, normalize=True),
        sha256=f"{seed:064d}",
        leftovers=(),
    )


def write_encoder(folder: Path, **options: Any) -> Path:
    source = make_source(**options)
    return save_converted(folder, source, source.encoder, {})


def make_rows(count: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """Half of the rows hold a good word, half a bad one, among 2 to 13 others."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = rng.choices(FILLER, k=rng.randint(2, 13))
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if number % 2 else BAD))
        rows.append({"text": " ".join(words), "label": "pos" if number % 2 else "neg"})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train_tiny(tmp_path: Path, name: str = "run", **options: Any) -> Trained:
    """Train on rows in `tmp_path`, with an encoder there; both are made if they are not there."""
    data = tmp_path / "rows.jsonl"
    if not data.exists():
        write_rows(data, make_rows())
    encoder = options.pop("encoder", None) or tmp_path / "encoder"
    if not encoder.exists():
        write_encoder(encoder)
    given: dict[str, Any] = {"recipe": RECIPE, "show_progress": False} | options
    return train(given.pop("path", data), COLUMNS, out_dir=tmp_path / name, encoder=encoder, **given)
