"""Token ids to vectors."""

from __future__ import annotations

from torch import Tensor, nn

from trilevel.errors import ShapeError


class TokenEmbedding(nn.Module):
    """A table of vectors with dropout behind it; positions come from the attention's rotary angles.

    Args:
        vocab_size: tokens in the vocabulary.
        dim: width of a vector.
        padding_id: token whose vector stays zero; None if every token is learned.
        dropout: on the vectors.
        max_tokens: longest input accepted.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        padding_id: int | None = 0,
        dropout: float = 0.0,
        max_tokens: int = 65_536,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, dim, padding_idx=padding_id)
        self.dropout = nn.Dropout(dropout)
        self.max_tokens = max_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids (batch, tokens) to (batch, tokens, dim).

        Raises:
            ShapeError: not two axes, not integers, or more than `max_tokens` tokens.
        """
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
        vectors: Tensor = self.dropout(self.table(input_ids))
        return vectors
