"""Held-out samples as dynamic paths read them: rows that can be batched, their truth, and who depends on whom."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import InputError
from trilevel.routing.steps import Arrays

Integers = npt.NDArray[np.integer[Any]]
BEGINNING = 12
"""Hexadecimal digits by which samples are compared: two different ones look equal in one of 2 ** 48 pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Samples of a task.

    Attributes:
        task: of the artifact.
        rows: what `collate` takes, one for each sample.
        digests: SHA-256 of each sample's content.
        groups: (samples,), equal where samples depend on each other, such as pages of one document.
        labels: (samples,), places in the model's labels; None if unknown.
        length_of: the length that a row is padded to.
        collate: arrays that the model reads, of rows and the length that all of them get.
        resize: a row of another length, to measure times of; None where all have one.
        judge: what a row's outputs (paths, ...) say: answers (paths,), equal where they are the same, and grades
            (paths,), 0 to 1; None where outputs are logits of classes.
    """

    task: str
    rows: Sequence[Any]
    digests: Sequence[str]
    groups: Integers
    labels: Integers | None
    length_of: Callable[[Any], int]
    collate: Callable[[Sequence[Any], int], Arrays]
    resize: Callable[[Any, int], Any] | None = None
    judge: Callable[[Any, npt.NDArray[Any]], tuple[Sequence[Any], Sequence[float]]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sha256(self) -> str:
        """Of all samples with their labels, in order."""
        labels = "" if self.labels is None else self.labels.tolist()
        return hashlib.sha256(repr((list(self.digests), labels)).encode()).hexdigest()

    @property
    def lengths(self) -> Integers:
        """What each row is padded to, (samples,)."""
        return np.array([self.length_of(row) for row in self.rows], np.int64)

    def example(self, batch: int, length: int) -> Arrays:
        """Inputs of a size, to measure times of."""
        rows = [self.rows[number % len(self.rows)] for number in range(batch)]
        return self.collate(rows if self.resize is None else [self.resize(row, length) for row in rows], length)

    def some(self, chosen: Iterable[int]) -> Samples:
        """Samples by their numbers."""
        numbers = np.fromiter(chosen, np.int64)
        return replace(
            self,
            rows=[self.rows[number] for number in numbers],
            digests=[self.digests[number] for number in numbers],
            groups=self.groups[numbers],
            labels=None if self.labels is None else self.labels[numbers],
        )


def check_apart(samples: Samples, known: Iterable[str], *, what: str) -> None:
    """Refuse samples that are known already: nothing can be promised from what a model was trained on.

    Args:
        samples: for calibration.
        known: digests of the training samples, or their beginnings.
        what: the data's name, for the message.

    Raises:
        InputError: a sample is among them.
    """
    shared = beginnings(samples.digests) & beginnings(known)
    if shared:
        raise InputError(
            f"{what}: {len(shared):,} of {len(samples):,} samples are among those that the model was trained on, by "
            "their content. Give data that it has not seen, or leave these out (--drop-known)."
        )


def without_known(samples: Samples, known: Iterable[str]) -> Samples:
    """The samples that are not known; see `check_apart`."""
    seen = beginnings(known)
    return samples.some(number for number, digest in enumerate(samples.digests) if digest[:BEGINNING] not in seen)


def beginnings(digests: Iterable[str]) -> set[str]:
    """What is kept and compared of digests."""
    return {digest[:BEGINNING] for digest in digests}
