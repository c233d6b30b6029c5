"""Image classifiers as something to compress: images of the run's own data, accuracy on its validation split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trilevel.applications.images.batches import ImageBatches
from trilevel.applications.images.checkpoint import CHECKPOINT_FOLDER, Run, load_run, save_run
from trilevel.applications.images.objective import check_alike
from trilevel.applications.images.score import logits_of, with_channels
from trilevel.compression.distill import Outputs, outputs_of
from trilevel.compression.written import write_json
from trilevel.data.image_folder import ImageSet, check_images, check_labels, load_images
from trilevel.data.image_sources import Progress
from trilevel.data.places import data_path
from trilevel.errors import ConfigError, InputError
from trilevel.model.checkpoint import weights_sha256
from trilevel.model.config import from_mapping
from trilevel.training.objectives import sequence_loss

NUM_CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The table `data` of a plan, as in the recipe of `trilevel train images`."""

    batch_size: int = 64
    crop_padding: int = 2
    flip: bool = False
    seed: int = 0


class ImageTask:
    """See `CompressionTask`."""

    kind = "images"
    metric = "accuracy"
    has_labels = True

    def __init__(self, run: Run, images: ImageSet, data: DataConfig) -> None:
        self.run, self.model, self.images = run, run.model, images
        self.source_sha256, self.data_sha256 = weights_sha256(run.folder / CHECKPOINT_FOLDER), _digest(images)
        self.labels = np.array([run.labels.index(label) for label in images.labels])[images.classes]
        self.batches = ImageBatches(
            images.pixels,
            self.labels,
            images.rows["train"],
            batch_size=data.batch_size,
            crop_padding=data.crop_padding,
            flip=data.flip,
            seed=data.seed,
        )
        rows = images.rows["train"][:NUM_CALIBRATION_IMAGES]
        self.calibration = [self._batch(rows[start : start + CALIBRATION_BATCH]) for start in
                            range(0, max(1, len(rows) - CALIBRATION_BATCH + 1), CALIBRATION_BATCH)]  # fmt: skip

    def _batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        pixels = with_channels(torch.from_numpy(self.images.pixels[rows]), self.run.model.config.patches.num_channels)
        return {"pixels": pixels, "labels": torch.from_numpy(self.labels[rows])}

    def steps_of(self, epochs: int) -> int:
        """Batches of so many epochs."""
        return epochs * self.batches.steps_of_epoch

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Outputs:
        """Logits of the classes, of inner heads too."""
        return outputs_of(model(batch["pixels"], return_exits=True))

    def supervised(self, outputs: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross entropy and accuracy."""
        assert outputs.logits is not None
        correct = (outputs.logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": sequence_loss(outputs.logits, batch["labels"]), "accuracy": correct}

    def importance(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The cross entropy."""
        return self.supervised(self.forward(model, batch), batch)["loss"]

    def evaluate(self, model: nn.Module, *, limit: int | None = None) -> dict[str, float]:
        """Accuracy and log loss on validation images."""
        rows = self.images.rows["valid"][:limit]
        logits, labels = logits_of(model, self.images.pixels[rows]), torch.from_numpy(self.labels[rows])
        correct = (logits.argmax(-1) == labels).double().mean()
        return {"accuracy": float(correct), "log_loss": float(sequence_loss(logits, labels)), "examples": len(rows)}

    def single(self) -> dict[str, Tensor]:
        """One image."""
        return self._batch(self.images.rows["train"][:1])

    def check_teacher(self, teacher: nn.Module) -> None:
        """Classes, sizes and the order of patches are the same."""
        assert isinstance(teacher, type(self.model))
        check_alike(teacher, self.model, with_hidden=False)
        if teacher.config.patches.token_order() != self.model.config.patches.token_order():
            raise ConfigError(
                "the teacher has its patches in another order, so tokens cannot be compared; choose one with the same "
                "patch_size, order and tile."
            )

    def load_teacher(self, folder: str | Path) -> tuple[nn.Module, str]:
        """The model of another run."""
        run = load_run(folder)
        return run.model, weights_sha256(run.folder / CHECKPOINT_FOLDER)

    def save(self, folder: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
        """Write a run."""
        save_run(replace(self.run, folder=folder, model=model))  # type: ignore[arg-type]  # a pruned or quantized one
        write_json(folder / "report.json", report)

    def load(self, folder: Path) -> nn.Module:
        """The model of a run."""
        return load_run(folder).model


def load_task(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
    cache: Path | None = None,
) -> ImageTask:
    """A run with the images it was trained on, or others of the same classes.

    Raises:
        InputError: the images are no longer there, or are others; a class that the model does not know.
        CheckpointError, ConfigError: as `load_run` and the options say.
    """
    run = load_run(folder)
    origin, settings = run.origin, from_mapping(DataConfig, options or {})
    path = data_path(origin.path if data is None else data)
    if data is None and not path.exists():
        raise InputError(f"{path}, which {folder} was trained on, is no longer there. Name the images with --data.")
    is_own = str(path.resolve()) == origin.path
    images = load_images(
        path,
        valid_fraction=origin.valid_fraction,
        limit=origin.limit if limit is None else limit,
        size=origin.size if is_own else run.model.config.patches.image_size,
        cache=cache,
        on_progress=on_progress,
    )
    check_images(images)
    check_labels(images, run.labels)
    if images.image_size != run.model.config.patches.image_size:
        raise InputError(
            f"{path} now holds images of {images.image_size} pixels and the model reads "
            f"{run.model.config.patches.image_size}. Restore the data, or name other data."
        )
    return ImageTask(run, images, settings)


def _digest(images: ImageSet) -> str:
    # what is read of the data depends on the limit as well
    counts = {split: len(rows) for split, rows in images.rows.items()}
    return f"{images.sha256} {counts}"
