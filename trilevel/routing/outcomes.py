"""What every path answers for every held-out sample: the table that routers are fitted and certified on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.compression.written import write_bytes
from trilevel.errors import InputError

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """Answers of the paths; the first axis of all arrays is the sample.

    Attributes:
        paths: names of the columns.
        full: the name of the reference.
        predictions: (samples, paths) int64, the class; where answers are no classes, the column of the first path
            that gives the same answer.
        margins: (samples, paths), the two largest logits' difference: how sure a path is.
        features: (samples, features), what is known before anything is computed.
        lengths: (samples,) int64, tokens.
        groups: (samples,) int64; samples of one group depend on each other and stay together.
        labels: (samples,) int64, the truth; None if unknown.
        grades: (samples, paths), 0 to 1, where a task grades answers, as ROUGE grades summaries; else None.
    """

    paths: tuple[str, ...]
    full: str
    predictions: Integers
    margins: Floats
    features: Floats
    lengths: Integers
    groups: Integers
    labels: Integers | None = None
    grades: Floats | None = None

    def __post_init__(self) -> None:
        """Check that the arrays belong together."""
        count, width = len(self.lengths), len(self.paths)
        shapes = {
            "predictions": (self.predictions, (count, width)),
            "margins": (self.margins, (count, width)),
            "features": (self.features, (count, *self.features.shape[1:2])),
            "groups": (self.groups, (count,)),
            "labels": (self.labels, (count,)),
            "grades": (self.grades, (count, width)),
        }
        wrong = [f"{name} {array.shape}" for name, (array, shape) in shapes.items()
                 if array is not None and array.shape != shape]  # fmt: skip
        if wrong:
            raise InputError(f"{count} samples and {width} paths do not go with {', '.join(wrong)}.")
        if self.full not in self.paths:
            raise InputError(f"the full path {self.full!r} is none of {', '.join(self.paths)}.")

    def __len__(self) -> int:
        return len(self.lengths)

    def column(self, path: str) -> int:
        """The place of a path.

        Raises:
            InputError: there is none of this name.
        """
        if path not in self.paths:
            raise InputError(f"there is no path {path!r}; there are {', '.join(self.paths)}.")
        return self.paths.index(path)

    @property
    def full_predictions(self) -> Integers:
        """(samples,), what the full path says."""
        return self.predictions[:, self.column(self.full)]

    def rows(self, chosen: Integers | npt.NDArray[np.bool_] | slice) -> Outcomes:
        """Some of the samples, by their numbers or a mask."""
        arrays: dict[str, Any] = {name: array[chosen] for name, array in self._arrays().items()}
        return replace(self, **arrays)

    def lost(self, answers: Integers) -> Floats | None:
        """Grade of the full path minus that of answers (samples, ...), which are columns; None without grades."""
        if self.grades is None:
            return None
        rows = np.arange(len(self)).reshape(-1, *[1] * (answers.ndim - 1))
        return np.asarray(self.grades[rows, self.full_predictions.reshape(rows.shape)] - self.grades[rows, answers])

    def beside(self, name: str, other: Outcomes, *, is_class: bool) -> Outcomes:
        """These with a last column of this name: what another model's full path says of the same samples.

        Args:
            name: of the other model.
            other: its outcomes.
            is_class: whether answers are classes. Where not, it is unknown whether the other model's is that of a path
                here, and counts as another.
        """
        theirs = [other.column(other.full)]
        own = other.predictions[:, theirs] if is_class else np.full((len(self), 1), len(self.paths))
        return replace(
            self,
            paths=(*self.paths, name),
            predictions=np.concatenate([self.predictions, own], axis=1),
            margins=np.concatenate([self.margins, other.margins[:, theirs]], axis=1),
            grades=None
            if self.grades is None or other.grades is None
            else np.concatenate([self.grades, other.grades[:, theirs]], axis=1),
        )

    def save(self, path: Path) -> None:
        """Write one .npz without pickles, whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, paths=np.array(self.paths), full=np.array(self.full), **self._arrays())
        write_bytes(path, buffer.getvalue())

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All that are there, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("paths", "full")}
        return {name: array for name, array in found.items() if array is not None}


def load_outcomes(path: Path) -> Outcomes:
    """What `Outcomes.save` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        names, full = tuple(map(str, found.pop("paths"))), str(found.pop("full"))
        return Outcomes(paths=names, full=full, **found)
    # numpy and zipfile raise errors of many classes for damaged files
    except Exception as error:
        raise InputError(f"{path} cannot be read ({error}). Remove it; it is then computed again.") from error


def split_groups(groups: Integers, shares: Sequence[float], *, seed: int) -> list[npt.NDArray[np.int64]]:
    """Samples of each part, no group in two of them; the shares are of the groups.

    Args:
        groups: (samples,).
        shares: of each part, together 1.
        seed: of the draw.
    """
    names, inverse = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.round(np.cumsum([0.0, *shares]) * len(names)).astype(int)
    part_of = np.empty(len(names), np.int64)
    for part in range(len(shares)):
        part_of[order[ends[part] : ends[part + 1]]] = part
    return [np.flatnonzero(part_of[inverse] == part) for part in range(len(shares))]
