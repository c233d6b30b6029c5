"""How a model is trained, as a value."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from trilevel.errors import ConfigError

Precision = Literal["32-true", "bf16-mixed"]

# a resumed run may change these: they alter when things are written and where they run, not the course of training
FREE_ON_RESUME = ("checkpoint_every", "log_every", "accelerator", "devices", "strategy")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Steps, optimizer, precision, devices.

    Args:
        steps: optimizer steps.
        learning_rate: highest rate, reached after `warmup_steps`; a cosine then takes it to `final_fraction` of that.
        warmup_steps: steps of linear growth from zero.
        final_fraction: share of the highest rate that is left at the last step.
        weight_decay: AdamW's, on matrices only: not on norms, biases and embeddings.
        betas: AdamW's.
        accumulate: batches whose gradients are averaged in one step.
        clip_norm: longest gradient; None leaves it.
        precision: `32-true`, or `bf16-mixed` (float32 weights, bfloat16 arithmetic).
        seed: of dropout and whatever else draws random numbers.
        checkpoint_every: steps between checkpoints; None writes one at the end only.
        log_every: steps between lines of the log.
        accelerator: `cpu`, `cuda` or `auto`.
        devices: processes (CPU) or GPUs.
        strategy: Lightning Fabric's, such as `ddp`; `auto` is one device, or `ddp` for more.
    """

    steps: int
    learning_rate: float = 3e-4
    warmup_steps: int = 0
    final_fraction: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    accumulate: int = 1
    clip_norm: float | None = 1.0
    precision: Precision = "32-true"
    seed: int = 0
    checkpoint_every: int | None = None
    log_every: int = 10
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("steps", "accumulate", "log_every", "devices", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"TrainConfig: {name}={value} must be >= 1.")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"TrainConfig: {name}={getattr(self, name)} must be >= 0.")
        if not self.learning_rate > 0:
            raise ConfigError(f"TrainConfig: learning_rate={self.learning_rate} must be > 0.")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"TrainConfig: final_fraction={self.final_fraction} must lie in [0, 1].")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"TrainConfig: clip_norm={self.clip_norm} must be > 0; None clips nothing.")
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"TrainConfig: precision={self.precision!r} is neither '32-true' nor 'bf16-mixed'.")

    def course(self) -> dict[str, Any]:
        """What decides the course of training, as JSON types; a resumed run must agree with it."""
        values = dataclasses.asdict(self) | {"betas": list(self.betas)}
        return {name: value for name, value in values.items() if name not in FREE_ON_RESUME}
