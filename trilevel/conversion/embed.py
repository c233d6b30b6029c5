"""Token vectors to one vector for a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilevel.conversion.sentence import Sentence
from trilevel.model.encoder import Encoder


def pooled(hidden: Tensor, padding_mask: Tensor | None, sentence: Sentence) -> Tensor:
    """One vector a row, (batch, dim), from (batch, tokens, dim).

    >>> hidden, padding = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), torch.tensor([[False, True]])
    >>> pooled(hidden, padding, Sentence(normalize=True))
    tensor([[1., 0.]])
    """
    if sentence.pooling == "cls":
        vector = hidden[:, 0]
    elif padding_mask is None:
        vector = hidden.mean(1)
    else:
        real = ~padding_mask[..., None]
        vector = torch.where(real, hidden, 0).sum(1) / real.sum(1).clamp_min(1)
    return F.normalize(vector, dim=-1) if sentence.normalize else vector


class Pooled(nn.Module):
    """An encoder with what makes one vector of its output, of ids and a mask, 1 at real tokens."""

    def __init__(self, encoder: Encoder, sentence: Sentence) -> None:
        super().__init__()
        self.encoder, self._sentence = encoder, sentence

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map two (batch, tokens) to vectors (batch, dim)."""
        padding = attention_mask == 0
        return pooled(self.encoder(input_ids, padding_mask=padding).float(), padding, self._sentence)
