"""A small dense encoder with random weights, and sequences for it."""

from __future__ import annotations

import torch
from torch import Tensor

from trilevel.attention.layer import MultiLevelAttention
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

VOCAB, DIM, HEADS, LAYERS = 61, 35, 5, 3


def dense_encoder(seed: int = 0, *, norm_first: bool = False) -> Encoder:
    """Post-norm (as BERT) or pre-norm, float64, weights large enough that heads differ."""
    torch.manual_seed(seed)
    config = EncoderConfig(
        vocab_size=VOCAB, dim=DIM, num_heads=HEADS, num_layers=LAYERS, levels=None, ffn_dim=41, norm_first=norm_first,
        rope_theta=None, num_positions=67, dropout=0.1,
    )  # fmt: skip
    encoder = Encoder(config).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder


def ids(lengths: tuple[int, ...], seed: int = 1) -> list[Tensor]:
    """Token ids, (tokens,) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def attention_of(encoder: Encoder, layer: int) -> MultiLevelAttention:
    """The attention of a block."""
    found = encoder.stack.blocks[layer].attention
    assert isinstance(found, MultiLevelAttention)
    return found
