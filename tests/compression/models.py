"""Small encoders that cover what can be pruned; sizes are different primes where they may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

VOCAB, DIM, HEAD_DIM, FFN, LAYERS, BATCH, TOKENS = 37, 20, 6, 13, 2, 3, 17
LEVELS = Levels(ratio=LevelRatio(3, 2, 1), window=3, region_size=4, num_global_tokens=2)
STRICT = replace(LEVELS, mode="strict")

# heads are 6 (3:2:1) unless said otherwise
CASES: dict[str, dict[str, Any]] = {
    "levels": {},
    "strict": {"levels": STRICT},
    "union": {"levels": replace(LEVELS, union=True, ratio=LevelRatio(3, 0, 1))},
    "grouped": {"num_heads": 12, "num_kv_heads": 6},
    "grouped_strict": {"num_heads": 12, "num_kv_heads": 6, "levels": STRICT},
    "dense_heads": {"num_heads": 8, "num_dense_heads": (2, 0)},
    "grouped_dense_heads": {"num_heads": 16, "num_kv_heads": 8, "num_dense_heads": 4},
    "dense": {"levels": None, "num_heads": 5},
    "one_layer_dense": {"levels": (None, LEVELS)},
    "gated": {"is_gated": True, "activation": "silu"},
    "no_bias": {"bias": False, "norm_bias": False, "is_gated": True},
    "post_norm": {"norm_first": False, "has_final_norm": False},
    "causal": {"is_causal": True},
    "no_rope": {"rope_theta": None, "num_positions": 7},
    "own_sizes": {"num_heads": (6, 7), "ffn_dim": (13, 11)},
}


def encoder(**changes: Any) -> Encoder:
    """In float64, evaluation mode, with weights large enough that errors show."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": DIM,
        "num_heads": 6,
        "head_dim": HEAD_DIM,
        "num_layers": LAYERS,
    }
    model = Encoder(EncoderConfig(**(sizes | {"ffn_dim": FFN, "levels": LEVELS} | changes))).double().eval()
    sharpen(model)
    return model


def sharpen(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def tokens(batch: int = BATCH, seed: int = 7) -> Tensor:
    return torch.randint(1, VOCAB, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))


def row_losses(model: nn.Module, batch: Tensor) -> Tensor:
    """A curved function of each row."""
    value: Tensor = model(batch).mean(1)[:, :7].sin().square().sum(1)
    return value


def square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return row_losses(model, batch).mean()
