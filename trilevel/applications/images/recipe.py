"""Training: a recipe (TOML) names the values, `train` fits a classifier to labelled images, alone or with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.applications.images.batches import ImageBatches
from trilevel.applications.images.checkpoint import CHECKPOINT_FOLDER, Origin, Run, load_run, prepare_run, saved_config
from trilevel.applications.images.model import ImageClassifier, ImageClassifierConfig
from trilevel.applications.images.objective import LossConfig, Objective, check_alike, distilled, supervised
from trilevel.applications.images.score import logits_of
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.data.image_folder import ImageSet, check_images, load_images
from trilevel.data.image_sources import Progress
from trilevel.data.places import data_path
from trilevel.errors import ConfigError
from trilevel.model.checkpoint import weights_sha256
from trilevel.model.config import EncoderConfig, from_mapping, levels_from_json
from trilevel.model.grid_order import GridOrder
from trilevel.model.patches import Patches
from trilevel.training.config import TrainConfig
from trilevel.training.loop import FitResult, fit
from trilevel.training.recipe import read_tables, train_config

NUM_VALIDATION_IMAGES = 512
"""Images that are looked at with each checkpoint."""
_NUM_MEASURED_IMAGES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """How images are split, batched and varied.

    Args:
        valid_fraction: share of the training images that is held out where the data does not say.
        batch_size: images of a batch.
        crop_padding: shift by up to this many pixels.
        flip: mirror half of the images; not where left and right matter.
        seed: of order, shifts and mirrors.
    """

    valid_fraction: float = 0.1
    batch_size: int = 64
    crop_padding: int = 2
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of the encoder.

    Args:
        dim, num_heads, num_layers, ffn_dim: as in `EncoderConfig`.
        patch_size: pixels on a side of a patch; it divides height and width.
        order: of the patches, as in `Patches`.
        tile: patches on a side of a tile, for the order `tiles`.
        dropout: in the blocks and before the linear map.
    """

    dim: int = 160
    num_heads: int = 5
    num_layers: int = 3
    ffn_dim: int = 320
    patch_size: int = 2
    order: GridOrder = "hilbert"
    tile: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Passes over the training images, or steps if given; the share of the steps in which the rate grows."""

    epochs: int = 10
    steps: int | None = None
    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r} must be a whole number >= 1.")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"schedule: warmup_fraction={self.warmup_fraction} must lie in [0, 1).")


def _default_levels() -> Levels:
    return Levels(ratio=LevelRatio(4, 4, 2), window=17, region_size=4, num_global_tokens=16)


def _default_train() -> TrainConfig:
    return TrainConfig(
        steps=1, learning_rate=1.5e-3, final_fraction=0.0, weight_decay=0.05, betas=(0.9, 0.999), checkpoint_every=200
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a classifier is trained; `train.steps` and `train.warmup_steps` follow from `schedule`."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    levels: Levels = field(default_factory=_default_levels)
    loss: LossConfig = field(default_factory=LossConfig)
    schedule: Schedule = Schedule()
    train: TrainConfig = field(default_factory=_default_train)


def load_recipe(path: str | Path | None = None) -> Recipe:
    """Read a recipe file; what it leaves out, and everything without a file, is `Recipe()`'s.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, a value is out of range.
    """
    if path is None:
        return Recipe()
    path = Path(path)
    parts: dict[str, Any] = {"data": DataConfig, "model": ModelConfig, "loss": LossConfig, "schedule": Schedule}
    values = read_tables(path, [*parts, "levels", "train"])
    made = {name: from_mapping(parts[name], values[name]) for name in parts if name in values}
    if "levels" in values:
        made["levels"] = _levels(values["levels"], path)
    return Recipe(**made, train=train_config(_default_train(), values.get("train", {}), path))


def _levels(table: Any, path: Path) -> Levels:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: levels={table!r} is no table; --dense leaves the levels out.")
    base = {name: getattr(Recipe().levels, name) for name in Levels.__dataclass_fields__}
    if "num_regions" in table:
        base["region_size"] = None
    levels = levels_from_json(base | dict(table))
    assert isinstance(levels, Levels)
    return levels


def parse_size(given: str) -> tuple[int, int]:
    """Height and width from `32` or `32x48`.

    >>> parse_size("32"), parse_size("32x48")
    ((32, 32), (32, 48))
    """
    parts = given.lower().split("x")
    if not (1 <= len(parts) <= 2 and all(part.isdecimal() and int(part) > 0 for part in parts)):
        raise ConfigError(f"size={given!r} must be a number of pixels, such as 32, or height and width, such as 32x48.")
    return int(parts[0]), int(parts[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training made.

    Attributes:
        run: the model and what belongs to it.
        fit: steps, loss, seconds.
        images: the data.
    """

    run: Run
    fit: FitResult
    images: ImageSet


Told = Callable[[ImageSet, ImageClassifier], None]
"""Told the data and the model before training starts."""


def train(
    path: str | Path,
    *,
    out_dir: str | Path,
    recipe: Recipe | None = None,
    is_dense: bool = False,
    teacher: str | Path | None = None,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
    on_start: Told = lambda _images, _model: None,
    show_progress: bool = True,
) -> Trained:
    """Train a classifier on labelled images and write `out_dir`; a run that was stopped goes on.

    Args:
        path: folder or archive, see `load_images`; also below TRILEVEL_DATA.
        out_dir: folder of the run.
        recipe: how.
        is_dense: leave the levels out: every head sees all patches.
        teacher: folder of a run on the same classes and sizes: weights are copied where shapes agree, and the loss is
            `distilled`.
        size: height and width that images are resized to.
        limit: images of each split, for a try.
        cache: of decoded images.
        on_progress: told how reading goes on.
        on_start: see `Told`.
        show_progress: draw a bar on standard error.

    Raises:
        InputError: the data cannot be used.
        ConfigError: a value is out of range, the teacher does not fit, or `out_dir` holds another run.
        CheckpointError: the teacher cannot be loaded, or the run cannot be written.
        TrainingInterrupted: the user stopped; the same call goes on.
    """
    path, out_dir, recipe = data_path(path), Path(out_dir), recipe or Recipe()
    taught = None if teacher is None else load_run(teacher)
    images = load_images(
        path, valid_fraction=recipe.data.valid_fraction, limit=limit, size=size, cache=cache, on_progress=on_progress
    )
    check_images(images)
    torch.manual_seed(recipe.train.seed)
    model = ImageClassifier(_classifier_config(images, recipe, is_dense=is_dense))
    if taught is not None:
        check_alike(taught.model, model, with_hidden=recipe.loss.hidden_weight > 0)
        _copy_equal(taught.model, model)
    origin = Origin(
        path=str(path.resolve()),
        sha256=images.sha256,
        size=size,
        valid_fraction=recipe.data.valid_fraction,
        limit=limit,
        teacher=None if taught is None else str(taught.folder),
        teacher_sha256=None if taught is None else weights_sha256(taught.folder / CHECKPOINT_FOLDER),
    )
    config = saved_config(model, origin)
    prepare_run(out_dir, config)
    on_start(images, model)
    batches = ImageBatches(
        images.pixels,
        images.classes,
        images.rows["train"],
        batch_size=recipe.data.batch_size,
        crop_padding=recipe.data.crop_padding,
        flip=recipe.data.flip,
        seed=recipe.data.seed,
    )
    result = fit(
        model,
        batches,
        _objective(recipe, taught, model),
        config=_planned(recipe, batches),
        out_dir=out_dir,
        model_config=config,
        evaluate=_validation(images),
        show_progress=show_progress,
    )
    run = Run(folder=out_dir, model=model.eval(), origin=origin, step=result.step, steps=result.step)
    return Trained(run=run, fit=result, images=images)


def _classifier_config(images: ImageSet, recipe: Recipe, *, is_dense: bool) -> ImageClassifierConfig:
    sizes = recipe.model
    patches = Patches(
        image_size=images.image_size,
        patch_size=(sizes.patch_size, sizes.patch_size),
        num_channels=images.num_channels,
        num_extra_tokens=0,
        order=sizes.order,
        tile=None if sizes.tile is None else (sizes.tile, sizes.tile),
    )
    encoder = EncoderConfig(
        vocab_size=None,
        dim=sizes.dim,
        num_heads=sizes.num_heads,
        num_layers=sizes.num_layers,
        ffn_dim=sizes.ffn_dim,
        levels=None if is_dense else recipe.levels,
        rope_theta=None,
        dropout=sizes.dropout,
        patches=patches,
    )
    mean, deviation = pixel_statistics(images)
    return ImageClassifierConfig(
        encoder=encoder, labels=images.labels, mean=mean, deviation=deviation, dropout=sizes.dropout
    )


def pixel_statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the training pixels, of each channel, over 10,000 images at most."""
    rows = images.rows["train"]
    pixels = images.pixels[np.sort(rows[:_NUM_MEASURED_IMAGES])]
    # whole numbers are summed exactly, in any order
    sums = pixels.sum((0, 2, 3), dtype=np.int64)
    squares = np.stack([np.square(channel.astype(np.int64)).sum() for channel in pixels.swapaxes(0, 1)])
    count = pixels.size // pixels.shape[1]
    mean = sums / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
    return tuple(np.round(mean, 4).tolist()), tuple(np.round(deviation, 4).tolist())


def _copy_equal(source: nn.Module, target: nn.Module) -> None:
    """Every weight that has the same name and shape in both."""
    given, wanted = source.state_dict(), target.state_dict()
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name in given and given[name].shape == tensor.shape:
                tensor.copy_(given[name])


def _objective(recipe: Recipe, taught: Run | None, model: ImageClassifier) -> Objective:
    if taught is None:
        return supervised(recipe.loss)
    return distilled(recipe.loss, taught.model, model, bfloat16=recipe.train.precision == "bf16-mixed")


def _planned(recipe: Recipe, batches: ImageBatches) -> TrainConfig:
    schedule = recipe.schedule
    steps = schedule.steps or max(1, schedule.epochs * batches.steps_of_epoch // recipe.train.accumulate)
    return replace(recipe.train, steps=steps, warmup_steps=int(schedule.warmup_fraction * steps))


def _validation(images: ImageSet) -> Callable[[nn.Module], dict[str, float]]:
    rows = images.rows["valid"][:NUM_VALIDATION_IMAGES]
    pixels, labels = images.pixels[rows], torch.from_numpy(images.classes[rows])

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits: Tensor = logits_of(model, pixels)
        return {
            "loss": float(F.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        }

    return evaluate
