"""Token ids to vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilevel.errors import ConfigError, ShapeError


class TokenEmbedding(nn.Module):
    """A table of vectors, optionally with token types, learned positions and a norm; dropout behind it.

    Args:
        vocab_size: tokens in the vocabulary.
        dim: width of a vector.
        padding_id: token whose vector stays zero; None if every token is learned.
        dropout: on the vectors.
        max_tokens: longest input accepted.
        num_positions: rows of learned absolute positions, read in turn beyond the last; None for none.
        num_token_types: rows of token types; None for none.
        norm: what follows the sum; None for nothing.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        padding_id: int | None = 0,
        dropout: float = 0.0,
        max_tokens: int = 65_536,
        num_positions: int | None = None,
        num_token_types: int | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim, padding_idx=padding_id)
        self.positions = None if num_positions is None else nn.Embedding(num_positions, dim)
        self.token_types = None if num_token_types is None else nn.Embedding(num_token_types, dim)
        self.norm = norm
        self.dropout = nn.Dropout(dropout)
        self.max_tokens = max_tokens

    def forward(
        self, input_ids: Tensor, *, positions: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Map ids (batch, tokens) to (batch, tokens, dim).

        Args:
            input_ids: (batch, tokens) int.
            positions: (batch or 1, tokens) int for the learned positions; default 0, 1, 2, ...
            token_type_ids: (batch, tokens) int; default all 0.

        Raises:
            ShapeError: not two axes, not integers, or more than `max_tokens` tokens.
            ConfigError: token types given to a model that has none.
        """
        self._check(input_ids, token_type_ids)
        vectors = self.table(input_ids)
        if self.token_types is not None:
            # the same row for all is added without being looked up for each
            types = self.token_types.weight[0] if token_type_ids is None else self.token_types(token_type_ids)
            vectors = vectors + types
        if self.positions is not None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device) if positions is None else positions
            vectors = vectors + self.positions(places % self.positions.num_embeddings)
        embedded: Tensor = self.dropout(vectors if self.norm is None else self.norm(vectors))
        return embedded

    def _check(self, input_ids: Tensor, token_type_ids: Tensor | None) -> None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ShapeError(
                f"input_ids has shape {tuple(input_ids.shape)} and type {input_ids.dtype}; integers (batch, tokens) "
                "are needed."
            )
        if input_ids.shape[1] > self.max_tokens:
            raise ShapeError(
                f"input_ids has {input_ids.shape[1]} tokens and the model takes {self.max_tokens}. Split the input or "
                "build the model with a larger max_tokens."
            )
        if token_type_ids is None:
            return
        if self.token_types is None:
            raise ConfigError("the model has no token types; leave token_type_ids out or set num_token_types.")
        if token_type_ids.shape != input_ids.shape:
            raise ShapeError(
                f"token_type_ids has shape {tuple(token_type_ids.shape)}; that of input_ids, "
                f"{tuple(input_ids.shape)}, is needed."
            )
