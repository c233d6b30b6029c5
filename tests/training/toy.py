"""A model and a data set small enough to train within a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder
from trilevel.model.heads import SequenceHead
from trilevel.training.config import TrainConfig

VOCAB, TOKENS, BATCH = 23, 19, 5
LEVELS = Levels(ratio=LevelRatio(2, 1, 1), window=5, region_size=7, num_global_tokens=3)


class Toy(nn.Module):
    """An encoder with dropout and a sequence head, always the same at first."""

    def __init__(self, *, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.config = EncoderConfig(vocab_size=VOCAB, dim=16, num_heads=4, num_layers=1, levels=LEVELS, dropout=dropout)
        self.encoder = Encoder(self.config)
        self.head = SequenceHead(16, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(input_ids))
        return logits


class ToyBatches:
    """Is the first token in the upper half of the vocabulary?"""

    def __init__(self, size: int = BATCH) -> None:
        self.size = size
        self.asked: list[int] = []

    def batch(self, step: int) -> dict[str, Tensor]:
        self.asked.append(step)
        ids = torch.randint(1, VOCAB, (self.size, TOKENS), generator=torch.Generator().manual_seed(step))
        return {"input_ids": ids, "labels": (ids[:, 0] > VOCAB // 2).long()}


def objective(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = model(batch["input_ids"])
    return {
        "loss": F.cross_entropy(logits, batch["labels"]),
        "accuracy": (logits.argmax(dim=1) == batch["labels"]).float().mean(),
    }


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"steps": 11, "learning_rate": 1e-2, "warmup_steps": 3, "log_every": 4} | changes))
