"""What is minimised: cross entropy, and with a teacher the distance to its answers and to its vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilevel.applications.images.model import ImageClassifier
from trilevel.compression.distill import distance, divergence
from trilevel.errors import ConfigError
from trilevel.training.objectives import sequence_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Weights of the parts.

    Args:
        label_smoothing: share of the truth that is spread over all classes.
        temperature: by which logits of student and teacher are divided.
        teacher_weight: of the divergence from the teacher; the cross entropy has the rest of 1. Only with a teacher.
        hidden_weight: of the distance of the tokens' vectors from the teacher's. Only with a teacher.
    """

    label_smoothing: float = 0.1
    temperature: float = 2.0
    teacher_weight: float = 0.7
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("label_smoothing", "teacher_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"loss: {name}={getattr(self, name)} must lie in [0, 1].")
        if not self.temperature > 0 or not self.hidden_weight >= 0:
            raise ConfigError(
                f"loss: temperature={self.temperature} must be > 0 and hidden_weight={self.hidden_weight} >= 0."
            )


Objective = Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]


def supervised(loss: LossConfig) -> Objective:
    """Cross entropy with smoothed labels."""

    def objective(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = model(batch["pixels"])
        return {
            "loss": sequence_loss(logits, batch["labels"], label_smoothing=loss.label_smoothing),
            "accuracy": _accuracy(logits, batch["labels"]),
        }

    return objective


def distilled(loss: LossConfig, teacher: ImageClassifier, student: ImageClassifier, *, bfloat16: bool) -> Objective:
    """Cross entropy, divergence from the teacher's softened answers, distance from its vectors (Hinton et al. 2015,
    arXiv 1503.02531; hidden states as in TinyBERT, 1909.10351, of the last layer).

    The teacher sees the same augmented images; it is in evaluation mode and gets no gradient.

    Raises:
        ConfigError: vectors cannot be compared, for the two differ in width or patches.
    """
    check_alike(teacher, student, with_hidden=loss.hidden_weight > 0)
    to_student = _places(teacher, student)

    def objective(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            wanted = teacher(batch["pixels"], return_hidden=True)
        found = model(batch["pixels"], return_hidden=True)
        parts = {
            "cross_entropy": sequence_loss(found.logits, batch["labels"], label_smoothing=loss.label_smoothing),
            "divergence": divergence(found.logits, wanted.logits, loss.temperature),
        }
        total = (1 - loss.teacher_weight) * parts["cross_entropy"] + loss.teacher_weight * parts["divergence"]
        if loss.hidden_weight > 0:
            parts["hidden"] = distance(found.hidden, wanted.hidden[:, to_student])
            total = total + loss.hidden_weight * parts["hidden"]
        return {"loss": total, **parts, "accuracy": _accuracy(found.logits, batch["labels"])}

    return objective


def check_alike(teacher: ImageClassifier, student: ImageClassifier, *, with_hidden: bool) -> None:
    """Raise `ConfigError` unless the teacher can teach this student."""
    ours, theirs = student.config, teacher.config
    if ours.labels != theirs.labels:
        raise ConfigError(f"the teacher has the classes {theirs.labels} and the data {ours.labels}.")
    sizes = [(config.patches.num_channels, *config.patches.image_size) for config in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the teacher reads images of {sizes[0]} (channels, height, width) and the student of {sizes[1]}; train "
            "both on the same images."
        )
    widths = [(config.encoder.dim, config.patches.grid, config.patches.num_extra_tokens) for config in (theirs, ours)]
    if with_hidden and widths[0] != widths[1]:
        raise ConfigError(
            f"the teacher has (dim, grid, extra tokens) {widths[0]} and the student {widths[1]}, so their vectors "
            "cannot be compared; set hidden_weight = 0.0 in the table loss, or choose the same sizes."
        )


def _places(teacher: ImageClassifier, student: ImageClassifier) -> Tensor:
    """Where in the teacher's row the tokens of the student's row stand."""
    theirs, ours = teacher.config.patches.token_order(), student.config.patches.token_order()
    place = {token: index for index, token in enumerate(theirs)}
    return torch.tensor([place.get(token, 0) for token in ours])


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()
