"""What an application gives so that its models can be compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from trilevel.compression.distill import Outputs
from trilevel.training.loop import Batches


class CompressionTask(Protocol):
    """A trained model with data to calibrate, train and judge it."""

    @property
    def kind(self) -> str:
        """The application."""
        ...

    @property
    def model(self) -> nn.Module:
        """The trained model, in evaluation mode; left alone."""
        ...

    @property
    def metric(self) -> str:
        """The number of `evaluate` that decides, higher is better."""
        ...

    @property
    def source_sha256(self) -> str:
        """Of the model's weights."""
        ...

    @property
    def data_sha256(self) -> str:
        """Of all examples that training, calibration and evaluation read."""
        ...

    @property
    def calibration(self) -> Sequence[Any]:
        """Batches of training examples, of all the lengths that will be served."""
        ...

    @property
    def batches(self) -> Batches:
        """Training batches, by number."""
        ...

    @property
    def has_labels(self) -> bool:
        """Whether `supervised` can be called."""
        ...

    def steps_of(self, epochs: int) -> int:
        """Batches of so many passes over the training examples."""
        ...

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        """Run a model, or what training wraps around it, on a batch of either kind."""
        ...

    def supervised(self, outputs: Outputs, batch: Any) -> dict[str, Tensor]:
        """Scalars for the log, `loss` among them, of the labels."""
        ...

    def importance(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar whose slope says what heads and channels matter."""
        ...

    def evaluate(self, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
        """Quality on held-out examples, or on the first of them, `metric` among the numbers."""
        ...

    def single(self) -> Any:
        """A batch of one example of usual size, to measure the time of."""
        ...

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise `ConfigError` unless a model answers what this one does."""
        ...

    def load_teacher(self, folder: str | Path) -> tuple[nn.Module, str]:
        """A model that can teach this one, and the SHA-256 of its weights."""
        ...

    def save(self, folder: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
        """Write a run that `load` reads back, `report.json` last."""
        ...

    def load(self, folder: Path) -> nn.Module:
        """The model of a run that `save` wrote, in evaluation mode."""
        ...
