"""Dense attention as a traditional implementation has it: the whole matrix of weights, all heads at once, in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.errors import ConfigError

BYTES_PER_WEIGHT = 8
"""Scores and their softmax, four bytes each, are alive at the same time."""


class MaterialisedAttention(nn.Module):
    """A dense layer with softmax(Q K^T) V written out; O(heads * tokens^2) memory, inference only."""

    levels = None

    def __init__(self, layer: MultiLevelAttention) -> None:
        """Share the parameters of `layer`, which must be dense, bidirectional and without grouped queries."""
        super().__init__()
        if layer.levels is not None or layer.is_causal or layer.num_kv_heads != layer.num_heads:
            raise ConfigError(f"a dense bidirectional layer with as many key heads as heads is needed, got {layer}.")
        self.layer = layer

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, positions: Tensor | None = None, **_: object
    ) -> Tensor:
        """Attend, (batch, tokens, dim) to the same; what belongs to levels is not used."""
        q, k, v = self.layer.project(x, positions)
        scores = (q * self.layer.head_dim**-0.5) @ k.transpose(-1, -2)
        if padding_mask is not None:
            scores.masked_fill_(padding_mask[:, None, None, :], -torch.inf)
        weights = scores.softmax(-1)
        del scores
        out: Tensor = self.layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
        return out


def materialise(model: nn.Module) -> nn.Module:
    """Put a `MaterialisedAttention` in the place of every attention layer of a dense model, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MultiLevelAttention) and not isinstance(parent, MaterialisedAttention):
                setattr(parent, name, MaterialisedAttention(child))
    return model


def materialised_bytes(num_heads: int, tokens: int) -> int:
    """Memory that one layer's weights take at their peak."""
    return BYTES_PER_WEIGHT * num_heads * tokens**2


def longest_that_fits(num_heads: int, memory_bytes: int) -> int:
    """The most tokens whose weights fit into `memory_bytes`.

    >>> longest_that_fits(4, materialised_bytes(4, 1_000))
    1000
    """
    return int((memory_bytes / (BYTES_PER_WEIGHT * num_heads)) ** 0.5)
