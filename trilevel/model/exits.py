"""Early exits: heads behind inner blocks, and a classifier run by the segments between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder
from trilevel.model.heads import SequenceHead


class ExitHead(nn.Module):
    """A norm of its own, the mean of the tokens, logits: what an inner block's output says of the classes.

    Args:
        dim: of a token.
        num_classes: of the logits.
        norm_eps: epsilon of the norm.
        dropout: before the linear map.
    """

    def __init__(self, dim: int, num_classes: int, *, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = SequenceHead(dim, num_classes, dropout=dropout)
        nn.init.normal_(self.head.logits.weight, std=0.02)
        nn.init.zeros_(self.head.logits.bias)

    def forward(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Map (batch, tokens, dim) to logits (batch, classes)."""
        logits: Tensor = self.head(self.norm(hidden), padding_mask=padding_mask)
        return logits


def exit_heads(encoder: EncoderConfig, exits: Sequence[int], num_classes: int, dropout: float) -> nn.ModuleList:
    """Heads behind blocks of an encoder with this configuration, none for no exits."""
    return nn.ModuleList(ExitHead(encoder.dim, num_classes, norm_eps=encoder.norm_eps, dropout=dropout) for _ in exits)


def check_exits(exits: tuple[int, ...], encoder: EncoderConfig) -> None:
    """Raise `ConfigError` unless exits stand behind inner blocks, in order, each once, and nothing else thins out."""
    if exits and encoder.focus is not None:
        raise ConfigError("an encoder with focus has no exits: its inner blocks see some tokens only. Leave one out.")
    num_layers = encoder.num_layers
    is_right = all(isinstance(place, int) and 0 < place < num_layers for place in exits)
    if not is_right or list(exits) != sorted(set(exits)):
        raise ConfigError(
            f"exits={list(exits)} must name inner blocks, rising: of {num_layers} blocks 1 to {num_layers - 1}. The "
            "last block has the model's own head."
        )


def even_exits(num_layers: int, num_segments: int) -> tuple[int, ...]:
    """Exits that cut blocks into segments as even as can be, the shorter ones first.

    >>> even_exits(6, 3), even_exits(7, 3), even_exits(3, 1)
    ((2, 4), (2, 4), ())

    Raises:
        ConfigError: there are fewer blocks than segments.
    """
    if not 1 <= num_segments <= num_layers:
        raise ConfigError(f"segments={num_segments} must be 1 to {num_layers}, the number of blocks.")
    return tuple(place * num_layers // num_segments for place in range(1, num_segments))


class Segmented(Protocol):
    """A classifier with exits: `exits` of its configuration, a head for each, and its own head.

    Attributes:
        config: `exits`, blocks behind which a segment ends.
        encoder: what is cut.
        exits: the inner heads.
    """

    config: Any
    encoder: Encoder
    exits: nn.ModuleList

    def embed(self, inputs: Tensor, padding_mask: Tensor | None) -> Tensor:
        """What the first block reads, (batch, tokens, dim)."""
        ...

    def answer(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Logits (batch, classes) of the encoder's output."""
        ...


def run_segment(
    model: Segmented, segment: int, hidden: Tensor, padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One segment over (batch, tokens, dim): its output, and the logits (batch, classes) of the head behind it."""
    ends = (*model.config.exits, len(model.encoder.stack.blocks))
    first = 0 if segment == 0 else ends[segment - 1]
    hidden = model.encoder.run(hidden, first, ends[segment], padding_mask=padding_mask)
    is_last = segment == len(ends) - 1
    logits: Tensor = (model.answer if is_last else model.exits[segment])(hidden, padding_mask)
    return hidden, logits


def run_segments(model: Segmented, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All segments over what the first block reads: the encoder's output, and logits (batch, segments, classes)."""
    said = []
    for segment in range(len(model.config.exits) + 1):
        hidden, logits = run_segment(model, segment, hidden, padding_mask)
        said.append(logits)
    return hidden, torch.stack(said, 1)
