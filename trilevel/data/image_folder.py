"""Labelled images, from folders or an archive of arrays, to bytes in one memory-mapped array and splits of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trilevel.data.image_cache import cached_pixels
from trilevel.data.image_sources import SPLITS, Progress, open_archive, open_folder
from trilevel.errors import ConfigError, InputError

MIN_IMAGES_OF_CLASS = 8
"""Training images that a class needs."""
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """Images with classes.

    Attributes:
        path: folder or archive.
        sha256: of the contents and classes of all images, before they were resized.
        labels: names of the classes.
        pixels: uint8 (images, channels, height, width), memory-mapped; one channel if all images are grey, else three.
        classes: int64 (images,), places in `labels`.
        rows: rows of `pixels` in each split, in the order of a hash of their content.
        num_shared: images of `valid` and `test` that are in `train` too; only a split of the user's own can do that.
    """

    path: Path
    sha256: str
    labels: tuple[str, ...]
    pixels: np.ndarray
    classes: np.ndarray
    rows: Mapping[str, np.ndarray]
    num_shared: int

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def num_channels(self) -> int:
        """1 or 3."""
        return int(self.pixels.shape[1])

    def counts(self, split: str) -> dict[str, int]:
        """Images of each class in a split."""
        found = np.bincount(self.classes[self.rows[split]], minlength=len(self.labels))
        return dict(zip(self.labels, found.tolist(), strict=True))


def load_images(
    path: str | Path,
    *,
    valid_fraction: float,
    limit: int | None = None,
    size: tuple[int, int] | None = None,
    cache: Path | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> ImageSet:
    """Read labelled images and split them.

    A folder is `DIR/class_name/*.png`, or the same below `DIR/train`, `DIR/valid` and `DIR/test`; an archive is an
    `.npz` with `y_train` and `x_train` (arrays) or `data_train` and `off_train` (files in a row), and so for the other
    splits. Where no image is in `valid`, a hash of the content takes some from `train`: equal files are never on both
    sides. Decoded images are kept in `cache`, by a hash of the contents.

    Args:
        path: a folder, or an archive.
        valid_fraction: share of the training images that is held out where the data does not say.
        limit: images of each split: those with the lowest hashes, which depend on neither name nor class.
        size: height and width that every image is resized to, its proportions given up; None for those they have.
        cache: folder; default below `XDG_CACHE_HOME` or `~/.cache`.
        on_progress: told what is done, how many are done and how many there are.

    Raises:
        InputError: the layout is unknown, an image is damaged, sizes differ, or the cache cannot be written.
        ConfigError: `valid_fraction`, `limit` or `size` is out of range.
    """
    if not 0 < valid_fraction < 1:
        raise ConfigError(f"valid_fraction={valid_fraction} must lie between 0 and 1.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be >= 1.")
    if size is not None and min(size) < 1:
        raise ConfigError(f"size={size} must be (height, width), both >= 1.")
    path = Path(path)
    source = open_folder(path, on_progress) if path.is_dir() else open_archive(path, on_progress)
    splits = np.array(source.splits)
    if not (splits == "valid").any():
        held = (splits == "train") & (source.marks < np.uint64(valid_fraction * 2**64))
        splits = np.where(held, "valid", splits)
    order = np.argsort(source.marks, kind="stable")
    trained = source.marks[splits == "train"]
    return ImageSet(
        path=path,
        sha256=source.sha256,
        labels=source.labels,
        pixels=cached_pixels(source, size=size, folder=cache, on_progress=on_progress),
        classes=np.array(source.classes, dtype=np.int64),
        rows={split: order[splits[order] == split][:limit] for split in SPLITS},
        num_shared=int(np.isin(source.marks[splits != "train"], trained).sum()),
    )


def check_images(images: ImageSet) -> None:
    """Raise `InputError` unless there are two classes or more, each with images to learn from, and some to validate."""
    if len(images.labels) < 2:
        raise InputError(
            f"{images.path}: all images are of the class {images.labels[0]!r}; at least two classes are needed, "
            "each in a folder of its own."
        )
    few = {label: count for label, count in images.counts("train").items() if count < MIN_IMAGES_OF_CLASS}
    if few:
        named = ", ".join(f"{label!r} has {count}" for label, count in list(few.items())[:_SHOWN])
        more = f" and {len(few) - _SHOWN} more classes" if len(few) > _SHOWN else ""
        raise InputError(
            f"{images.path}: {len(few)} of {len(images.labels)} classes have fewer than {MIN_IMAGES_OF_CLASS} training "
            f"images: {named}{more}. Add images, join classes, or raise --limit."
        )
    if not len(images.rows["valid"]):
        raise InputError(
            f"{images.path}: {len(images.rows['train'])} images are too few to hold any out for validation; add "
            "images, or folders train, valid and test."
        )


def check_labels(images: ImageSet, labels: Sequence[str]) -> None:
    """Raise `InputError` if an image is of a class that the model does not know."""
    unknown = sorted(set(images.labels) - set(labels))
    if unknown:
        raise InputError(
            f"{images.path}: unknown classes {', '.join(map(repr, unknown[:_SHOWN]))}; the model knows "
            f"{', '.join(map(repr, labels))}."
        )
