"""How close a converted encoder is to its original, and what both cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilevel.attention.cost import entry_counts, predicted_ms
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion.embed import pooled
from trilevel.conversion.profile import ALONE, Progress
from trilevel.conversion.sentence import Sentence
from trilevel.model.encoder import Encoder

REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A converted encoder beside its original on the same sequences.

    Args:
        cosine: mean cosine of the pooled vectors.
        lowest_cosine: of the worst sequence.
        hidden_error: mean square of the difference of the token vectors over the original's mean square.
        num_sequences: compared.
    """

    cosine: float
    lowest_cosine: float
    hidden_error: float
    num_sequences: int

    @property
    def loss(self) -> float:
        """1 - mean cosine."""
        return 1 - self.cosine


@torch.no_grad()
def compare(original: Encoder, converted: Encoder, sequences: Sequence[Tensor], sentence: Sentence) -> Quality:
    """Run both on every sequence (without its batch axis)."""
    cosines, difference, square = [], 0.0, 0.0
    for sequence in sequences:
        wanted, given = (encoder(sequence[None]) for encoder in (original, converted))
        one, other = (pooled(hidden, None, sentence) for hidden in (wanted, given))
        cosines.append(float(F.cosine_similarity(one, other)))
        difference += float((given - wanted).square().sum())
        square += float(wanted.square().sum())
    return Quality(
        cosine=statistics.fmean(cosines),
        lowest_cosine=min(cosines),
        hidden_error=difference / square,
        num_sequences=len(cosines),
    )


def head_costs(levels: Levels, *, tokens: int) -> tuple[float, float, float, float]:
    """(query, entry) pairs of a local, regional, global and dense head at some length."""
    own = [entry_counts(replace(levels, ratio=ratio), tokens=tokens)[place] for place, ratio in enumerate(ALONE)]
    return (*map(float, own), float(entry_counts(None, tokens=tokens).local))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one input of some length costs with the original and the converted encoder, on this machine.

    Args:
        tokens: of the input.
        dense_attention_ms, attention_ms: predicted by the cost model, attention alone, all blocks.
        dense_ms, converted_ms: measured, the whole encoder, float32, median of runs that take turns.
    """

    tokens: int
    dense_attention_ms: float
    attention_ms: float
    dense_ms: float
    converted_ms: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with the ratio of the measured times."""
        return asdict(self) | {"speedup": self.dense_ms / self.converted_ms}


@torch.no_grad()
def costs_at(original: Encoder, converted: Encoder, tokens: int, progress: Progress) -> Costs:
    """Predict and measure at one length; ids are all the same token, which costs what any text does.

    An encoder of images gets an image, whose length `tokens` must be.
    """
    progress(f"measuring at {tokens:,} tokens", 0.0)
    patches = original.config.patches
    inputs = torch.ones(1, tokens, dtype=torch.int64)
    if patches is not None:
        inputs = torch.zeros(1, patches.num_channels, *patches.image_size)
    seconds: list[list[float]] = [[], []]
    for _ in range(REPEATS + 1):
        for own, encoder in zip(seconds, (original, converted), strict=True):
            start = time.perf_counter()
            encoder(inputs)
            own.append(time.perf_counter() - start)
    dense_ms, converted_ms = (1e3 * statistics.median(own[1:]) for own in seconds)
    progress(f"measuring at {tokens:,} tokens", 1.0)
    return Costs(
        tokens=tokens,
        dense_attention_ms=_attention_ms(original, tokens),
        attention_ms=_attention_ms(converted, tokens),
        dense_ms=dense_ms,
        converted_ms=converted_ms,
    )


def _attention_ms(encoder: Encoder, tokens: int) -> float:
    layers = [part for part in encoder.modules() if isinstance(part, MultiLevelAttention)]
    return math.fsum(_layer_ms(layer, tokens) for layer in layers)


def _layer_ms(layer: MultiLevelAttention, tokens: int) -> float:
    dense = layer.num_heads if layer.levels is None else layer.num_dense_heads
    parts: list[tuple[Levels | None, int]] = [(None, dense)]
    if layer.levels is not None:
        own = replace(layer.levels, ratio=LevelRatio(*layer.head_split))
        parts.append((own, layer.num_heads - dense))
    return sum(
        predicted_ms(
            levels, batch=1, num_heads=heads, num_kv_heads=heads, tokens=tokens, head_dim=layer.head_dim,
            dtype=layer.in_proj.weight.dtype, impl="dense" if levels is None else "native",
        )
        for levels, heads in parts
        if heads
    )  # fmt: skip
