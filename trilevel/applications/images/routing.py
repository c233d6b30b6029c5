"""Images as samples of dynamic paths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trilevel.applications.images.checkpoint import Run
from trilevel.applications.images.evaluate import HeldOut, held_out
from trilevel.data.images import with_channels
from trilevel.routing.samples import Samples


def load_samples(
    run: Run, data: str | Path | None, split: str | None, *, limit: int | None = None, cache: Path | None = None
) -> Samples:
    """Images of a split of the run's data, or of other data of the same classes; each is a group of its own.

    Raises:
        InputError: as `held_out` says.
    """
    images: HeldOut = held_out(run, data, split=split, limit=limit, cache=cache)
    places = np.array([run.labels.index(label) for label in images.labels])
    channels = run.model.config.patches.num_channels

    def collate(rows: Sequence[npt.NDArray[np.uint8]], _length: int) -> dict[str, npt.NDArray[np.uint8]]:
        return {"pixels": np.ascontiguousarray(with_channels(np.stack(rows), channels))}

    return Samples(
        task="images",
        rows=list(images.pixels),
        digests=[hashlib.sha256(one.tobytes()).hexdigest() for one in images.pixels],
        groups=np.arange(len(images.classes)),
        labels=places[images.classes],
        length_of=lambda _row: run.model.config.patches.num_tokens,
        collate=collate,
    )
