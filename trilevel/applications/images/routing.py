"""Images as samples of dynamic paths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import Artifact, labels_of
from trilevel.data.image_folder import check_labels, load_images
from trilevel.data.images import with_channels
from trilevel.data.places import data_path
from trilevel.errors import InputError
from trilevel.routing.samples import Samples


def load_samples(
    artifact: Artifact, data: str | Path, *, split: str | None = None, limit: int | None = None
) -> Samples:
    """Images of a split, or of all; each is a group of its own.

    Args:
        artifact: of a classifier, which says the classes and sizes.
        data: folder or archive; also below TRILEVEL_DATA.
        split: `train`, `valid` or `test`, as the training split them; None for all images.
        limit: images at most.

    Raises:
        InputError: the data cannot be read, has a class that the model does not know, or no such image.
    """
    path, settings = data_path(data), artifact.manifest.settings
    channels, *size = map(int, artifact.manifest.inputs["pixels"].axes[1:])
    images = load_images(path, valid_fraction=float(settings.get("valid_fraction", 0.1)), size=(size[0], size[1]))
    labels = labels_of(artifact.manifest)
    check_labels(images, tuple(labels))
    rows = images.rows[split] if split else np.concatenate(list(images.rows.values()))
    # folders come class by class
    rows = np.random.default_rng(0).permutation(rows)[:limit]
    if not len(rows):
        raise InputError(f"{path}: no image{f' in the split {split!r}' if split else ''}.")
    places = np.array([labels.index(label) for label in images.labels])

    def collate(chosen: Sequence[npt.NDArray[np.uint8]], _length: int) -> dict[str, npt.NDArray[np.uint8]]:
        return {"pixels": np.ascontiguousarray(with_channels(np.stack(chosen), channels))}

    return Samples(
        task="images",
        rows=[images.pixels[row] for row in rows],
        digests=[hashlib.sha256(images.pixels[row].tobytes()).hexdigest() for row in rows],
        groups=np.arange(len(rows)),
        labels=places[images.classes[rows]],
        length_of=lambda _row: 1,
        collate=collate,
    )
