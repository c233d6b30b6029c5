"""The encoder: embedding, blocks, final norm; and the same weights under other levels."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from trilevel.model.block import init_weights
from trilevel.model.config import EncoderConfig, LayerLevels
from trilevel.model.embed import TokenEmbedding
from trilevel.model.stack import BlockStack, Details
from trilevel.model.weights import copy_shared


class Encoder(nn.Module):
    """Token ids to one vector per token, through pre-norm blocks on `MultiLevelAttention`.

    >>> import torch
    >>> config = EncoderConfig(vocab_size=11, dim=8, num_heads=2, num_layers=1, levels=None)
    >>> Encoder(config)(torch.tensor([[3, 5, 7]])).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(
            config.vocab_size,
            config.dim,
            padding_id=config.padding_id,
            dropout=config.dropout,
            max_tokens=config.max_tokens,
        )
        init_weights(self.embedding, num_layers=config.num_layers)
        self.stack = BlockStack(
            config.dim,
            config.num_heads,
            config.num_layers,
            config.levels,
            num_kv_heads=config.num_kv_heads,
            ffn_dim=config.ffn_dim,
            rope_theta=config.rope_theta,
            dropout=config.dropout,
            norm_eps=config.norm_eps,
            is_causal=config.is_causal,
            focus=config.focus,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        global_prior: Tensor | None = None,
        global_forced: Tensor | None = None,
        unit_ids: Tensor | None = None,
        num_units: int | None = None,
        focus_fraction: float | None = None,
        return_details: bool = False,
        explain: bool = False,
    ) -> Tensor | Details:
        """Map `input_ids` (batch, tokens) to (batch, tokens, dim); the arguments are those of `BlockStack.forward`.

        Padding is what `padding_mask` says (true at padding), not what equals `padding_id`.
        """
        hidden: Tensor | Details = self.stack(
            self.embedding(input_ids),
            padding_mask=padding_mask,
            segment_ids=segment_ids,
            num_segments=num_segments,
            global_prior=global_prior,
            global_forced=global_forced,
            unit_ids=unit_ids,
            num_units=num_units,
            focus_fraction=focus_fraction,
            return_details=return_details,
            explain=explain,
        )
        return hidden


def with_levels(encoder: Encoder, levels: LayerLevels) -> Encoder:
    """A new encoder with other levels and a copy of every weight both have; extra ones are freshly initialised.

    The result has the type, device and training mode of `encoder`.
    """
    twin = Encoder(dataclasses.replace(encoder.config, levels=levels))
    weight = encoder.embedding.table.weight
    twin.to(device=weight.device, dtype=weight.dtype).train(encoder.training)
    copy_shared(encoder, twin)
    return twin


def dense_twin(encoder: Encoder) -> Encoder:
    """The same encoder with dense attention; pooling, scorer and gates of the levels are left out."""
    return with_levels(encoder, None)
