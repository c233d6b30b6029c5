"""Images small enough to learn within a test: a bright square among stripes that lie or stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilevel.applications.images.recipe import DataConfig, ModelConfig, Recipe, Schedule, Trained, train
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.training.config import TrainConfig

SIZE, STEPS = 12, 200
LABELS = ("lying", "standing")
LEVELS = Levels(ratio=LevelRatio(4, 4, 2), window=5, region_size=4, num_global_tokens=3)
RECIPE = Recipe(
    data=DataConfig(batch_size=16, valid_fraction=0.2, crop_padding=1, flip=True),
    model=ModelConfig(dim=24, num_heads=3, num_layers=2, ffn_dim=32, order="hilbert"),
    levels=LEVELS,
    schedule=Schedule(steps=STEPS),
    train=TrainConfig(steps=1, learning_rate=3e-3, log_every=5, checkpoint_every=20),
)


def make_image(label: str, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(seed)
    # every other line; a patch of 2 x 2 pixels shows which way they go
    stripes = np.tile([[40], [160]], (SIZE, SIZE))[rng.integers(0, 2) :][:SIZE]
    image = stripes if label == "lying" else stripes.T
    row, column = rng.integers(0, SIZE - 3, 2)
    image = image + rng.integers(-30, 30, image.shape)
    image[row : row + 3, column : column + 3] = 250
    return image.clip(0, 255).astype(np.uint8)


def write_images(folder: Path, count: int = 60, *, seed: int = 0, labels: tuple[str, ...] = LABELS) -> Path:
    pil = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra 'images'")
    for place, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = make_image(LABELS[place % 2], 10_000 * seed + 1_000 * place + number)
            pil.fromarray(image).save(folder / label / f"{number}.png")
    return folder


def train_tiny(folder: Path, name: str = "run", **options: Any) -> Trained:
    data = folder / "images"
    if not data.exists():
        write_images(data)
    defaults: dict[str, Any] = {"recipe": RECIPE, "cache": folder / "cache", "show_progress": False}
    return train(data, out_dir=folder / name, **(defaults | options))
