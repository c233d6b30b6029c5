"""What a model costs: numbers, bytes, time of one example."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from trilevel.compression.distill import Forward
from trilevel.compression.layers import FrozenEmbedding, FrozenEmbedding4bit, FrozenLinear, FrozenLinear4bit
from trilevel.compression.quantize import quantized_bytes

REPEATS = 9


def count_parameters(model: nn.Module) -> int:
    """Numbers that were learned, stored integers among them."""
    kinds = FrozenLinear | FrozenLinear4bit | FrozenEmbedding | FrozenEmbedding4bit
    frozen = [part for part in model.modules() if isinstance(part, kinds)]
    learned = sum(part.numel() for part in model.parameters())
    return learned + sum(part.weight.numel() for part in frozen)


def size(model: nn.Module) -> dict[str, int]:
    """Parameters, and bytes of all tensors as they are stored; of a quantized model before it is frozen."""
    return {"parameters": count_parameters(model), "bytes": quantized_bytes(model)}


def latency_ms(
    models: dict[str, nn.Module], batch: Any, forward: Forward, *, repeats: int = REPEATS
) -> dict[str, float]:
    """Median time of a batch with each model, in evaluation mode; the models take turns, the first turn counts not."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                forward(model, batch)
                if turn:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(own) for name, own in times.items()}
