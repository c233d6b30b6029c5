"""A BERT of random weights that knows the words of the test document, as a folder; and that folder converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.conversion.pretrained import DIM, LAYERS, make, tokenizers
from trilevel.attention.levels import Levels
from trilevel.conversion.assign import Classes
from trilevel.conversion.converted import save_converted
from trilevel.conversion.multilevel import with_classes
from trilevel.conversion.source import load_source

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLASSES: Classes = np.array([[2, 0, 1], [3, 1, 0], [0, 0, 1]])
NAMES = ("local", "regional", "global", "dense")


def save_pretrained(folder: Path, text: str) -> Path:
    """A dense one, whose tokenizer puts `[CLS]` before a text and `[SEP]` behind it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    make("bert", vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_small_converted(folder: Path, pretrained: Path, classes: Classes = CLASSES) -> Path:
    """With pooling and biases that moved; by default with local, regional, global and dense heads."""
    source = load_source(pretrained)
    levels = Levels(window=5, region_size=3, num_global_tokens=2)
    encoder = with_classes(source.encoder, classes, levels, [torch.randn(DIM) for _ in range(LAYERS)])
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith(("bias", "pool_weight")):
                weight.add_(0.1 * torch.randn_like(weight))
    layers = [{"heads": [{"class": NAMES[place]} for place in block]} for block in classes]
    return save_converted(folder, source, encoder, {"layers": layers})
