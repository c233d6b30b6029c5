"""Short distillation: a converted encoder learns to give what the dense one gives, on unlabelled text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilevel.conversion.embed import pooled
from trilevel.conversion.sentence import Sentence
from trilevel.conversion.sequences import pad
from trilevel.errors import ConfigError
from trilevel.model.encoder import Encoder
from trilevel.training.loop import Objective

Trained = Literal["levels", "small", "all"]
"""Pooling and scorers; these and all norms and biases; every weight but the token table."""
LEVEL_WEIGHTS = ("pool_weight", "scorer.weight", "region_gate.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillBatches:
    """Batches of token sequences or images, drawn again in each epoch, a function of the step alone.

    Args:
        sequences: token ids, (tokens,) each, or images of one size, (channels, height, width) each.
        batch_size: sequences a batch.
        padding_id: of the tokens behind a shorter sequence.
        seed: of the order.
    """

    sequences: Sequence[Tensor]
    batch_size: int
    padding_id: int
    seed: int = 0

    def batch(self, step: int) -> dict[str, Tensor]:
        """`input_ids` and `padding_mask`, both (batch, tokens); images are `input_ids` alone."""
        first = step * self.batch_size
        chosen = [self.sequences[self._place(first + turn)] for turn in range(self.batch_size)]
        if chosen[0].ndim > 1:
            return {"input_ids": torch.stack(chosen)}
        input_ids, padding_mask = pad(chosen, self.padding_id)
        return {"input_ids": input_ids, "padding_mask": padding_mask}

    def _place(self, number: int) -> int:
        epoch, place = divmod(number, len(self.sequences))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return int(torch.randperm(len(self.sequences), generator=generator)[place])


def train_only(encoder: nn.Module, which: Trained) -> int:
    """Let gradients flow to the chosen weights alone; returns how many numbers those are.

    Raises:
        ConfigError: `which` is unknown.
    """
    if which not in ("levels", "small", "all"):
        raise ConfigError(f"trained={which!r} is unknown; use 'levels', 'small' or 'all'.")
    norms = {id(weight) for part in encoder.modules() if isinstance(part, nn.LayerNorm) for weight in part.parameters()}
    tables = {id(part.weight) for part in encoder.modules() if isinstance(part, nn.Embedding)}
    count = 0
    for name, weight in encoder.named_parameters():
        is_small = id(weight) in norms or name.endswith(".bias")
        is_trained = name.endswith(LEVEL_WEIGHTS) or (which != "levels" and is_small)
        is_trained = is_trained or (which == "all" and id(weight) not in tables)
        weight.requires_grad_(is_trained)
        count += weight.numel() * is_trained
    return count


def distillation(teacher: Encoder, student: Encoder, sentence: Sentence, *, hidden_weight: float = 1.0) -> Objective:
    """The objective `(wrapped student, batch) -> losses` of `trilevel.training.loop.fit`.

    `loss` is `embedding`, one minus the cosine of the pooled outputs, plus `hidden_weight` times `hidden`, the mean
    over the blocks of the squared distance of their outputs over the teacher's square. Padding counts nowhere.

    Args:
        teacher: the dense encoder, in evaluation mode.
        student: the converted one, whose blocks are watched.
        sentence: how tokens are pooled into a vector.
        hidden_weight: of the hidden states.
    """

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        padding = batch.get("padding_mask")
        with torch.no_grad(), _outputs(teacher) as wanted:
            goal = pooled(teacher(**batch), padding, sentence)
        with _outputs(student) as given:
            embedding = pooled(model(**batch), padding, sentence)
        cosine = 1 - F.cosine_similarity(embedding.float(), goal.float(), dim=-1).mean()
        real = None if padding is None else ~padding[..., None]
        hidden = torch.stack([_distance(own, other, real) for own, other in zip(given, wanted, strict=True)]).mean()
        return {"loss": cosine + hidden_weight * hidden, "embedding": cosine, "hidden": hidden}

    return objective


def _distance(given: Tensor, wanted: Tensor, real: Tensor | None) -> Tensor:
    given, wanted = (x.float() if real is None else torch.where(real, x.float(), 0) for x in (given, wanted))
    return (given - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


@contextmanager
def _outputs(encoder: Encoder) -> Iterator[list[Tensor]]:
    """Collects what each block gives while the encoder runs."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, output: Tensor) -> None:
        found.append(output)

    handles = [block.register_forward_hook(keep) for block in encoder.stack.blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
