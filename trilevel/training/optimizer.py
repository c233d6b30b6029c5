"""AdamW with decay on matrices only, and its learning rate at each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from trilevel.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay, and norms, biases, embeddings and other vectors do not."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # one kernel over all parameters: on small models the loop over them costs as much as the arithmetic
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, then a cosine to `final_fraction` at the last step.

    >>> config = TrainConfig(steps=101, learning_rate=1.0, warmup_steps=4, final_fraction=0.0)
    >>> [round(learning_rate(step, config), 2) for step in (0, 3, 4, 52, 100)]
    [0.25, 1.0, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * cosine)
