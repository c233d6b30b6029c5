"""The encoder: embedding and blocks; and the same weights under other levels."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from trilevel.errors import ConfigError
from trilevel.model.block import init_weights
from trilevel.model.config import EncoderConfig, LayerCounts, LayerLevels
from trilevel.model.embed import TokenEmbedding
from trilevel.model.patches import PatchEmbedding
from trilevel.model.positions import places_in_segments, places_of_real_tokens
from trilevel.model.stack import BlockStack, Details
from trilevel.model.weights import copy_shared


class Encoder(nn.Module):
    """Token ids, or images, to one vector per token, through blocks on `MultiLevelAttention`.

    >>> import torch
    >>> config = EncoderConfig(vocab_size=11, dim=8, num_heads=2, num_layers=1, levels=None)
    >>> Encoder(config)(torch.tensor([[3, 5, 7]])).shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        # either kind; their tables have names of their own
        self.embedding: Any = _embedding(config)
        init_weights(self.embedding, num_layers=config.num_layers)
        self.stack = BlockStack(
            config.dim,
            config.num_heads,
            config.num_layers,
            config.levels,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_dense_heads=config.num_dense_heads,
            ffn_dim=config.ffn_dim,
            rope_theta=config.rope_theta,
            dropout=config.dropout,
            norm_eps=config.norm_eps,
            is_causal=config.is_causal,
            norm_first=config.norm_first,
            has_first_norm=config.has_first_norm,
            has_final_norm=config.has_final_norm,
            bias=config.bias,
            norm_bias=config.norm_bias,
            activation=config.activation,
            is_gated=config.is_gated,
            focus=config.focus,
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        token_type_ids: Tensor | None = None,
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

        With `config.patches`, `input_ids` are images (batch, channels, height, width) of floating-point numbers and the
        tokens are the extra ones and the patches. `token_type_ids` (batch, tokens) default to 0. Padding is what
        `padding_mask` says (true at padding), not what equals `padding_id`.

        Raises:
            ConfigError: token types given to a model that has none.
            ShapeError: a wrong shape or type.
        """
        positions = self._positions(padding_mask, segment_ids)
        hidden: Tensor | Details = self.stack(
            self._embed(input_ids, positions, token_type_ids),
            padding_mask=padding_mask,
            segment_ids=segment_ids,
            num_segments=num_segments,
            positions=positions,
            global_prior=global_prior,
            global_forced=global_forced,
            unit_ids=unit_ids,
            num_units=num_units,
            focus_fraction=focus_fraction,
            return_details=return_details,
            explain=explain,
        )
        return hidden

    def embed(self, inputs: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """What the first block reads, (batch, tokens, dim), of the inputs of `forward`."""
        return self._embed(inputs, self._positions(padding_mask, None), None)

    def run(self, hidden: Tensor, first: int, last: int, *, padding_mask: Tensor | None = None) -> Tensor:
        """Blocks `first` to before `last`; with the final norm if these are the last ones."""
        positions = self._positions(padding_mask, None)
        hidden = self.stack.run(hidden, first, last, padding_mask=padding_mask, positions=positions)
        return self.stack.final_norm(hidden) if last == len(self.stack.blocks) else hidden

    def _positions(self, padding_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
        """Places that differ from 0, 1, 2, ...; (batch, tokens)."""
        if self.config.positions_skip_padding and padding_mask is not None:
            return places_of_real_tokens(padding_mask, segment_ids)
        return None if segment_ids is None else places_in_segments(segment_ids)

    def _embed(self, inputs: Tensor, positions: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        if self.config.patches is None:
            embedded: Tensor = self.embedding(inputs, positions=positions, token_type_ids=token_type_ids)
            return embedded
        if token_type_ids is not None:
            raise ConfigError("an encoder of images has no token types; leave token_type_ids out.")
        embedded = self.embedding(inputs)
        return embedded


def _embedding(config: EncoderConfig) -> TokenEmbedding | PatchEmbedding:
    norm = nn.LayerNorm(config.dim, eps=config.norm_eps, bias=config.norm_bias) if config.has_embedding_norm else None
    if config.patches is not None:
        return PatchEmbedding(config.patches, config.dim, dropout=config.dropout, norm=norm)
    assert config.vocab_size is not None
    return TokenEmbedding(
        config.vocab_size,
        config.dim,
        padding_id=config.padding_id,
        dropout=config.dropout,
        max_tokens=config.max_tokens,
        num_positions=config.num_positions,
        num_token_types=config.num_token_types,
        norm=norm,
    )


def with_levels(encoder: Encoder, levels: LayerLevels, *, num_dense_heads: LayerCounts = 0) -> Encoder:
    """A new encoder with other levels and a copy of every weight both have; extra ones are freshly initialised.

    The result has the type, device and training mode of `encoder`.
    """
    twin = Encoder(dataclasses.replace(encoder.config, levels=levels, num_dense_heads=num_dense_heads))
    weight = next(encoder.parameters())
    twin.to(device=weight.device, dtype=weight.dtype).train(encoder.training)
    copy_shared(encoder, twin)
    return twin


def dense_twin(encoder: Encoder) -> Encoder:
    """The same encoder with dense attention; pooling, scorer and gates of the levels are left out."""
    return with_levels(encoder, None)
