"""What is promised of a cheaper path: a loss for each sample, and the bound on its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from trilevel.errors import ConfigError, InputError

Kind = Literal["agreement", "harm", "net", "recall", "bounded", "drop"]
SIGNED = ("net", "drop")
"""Whose loss is from -1 to 1: answers made better make up for others."""
Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
_TEXT = "KIND:BOUND, as in harm:0.01, agreement:0.02, net:0.01, recall=CLASS:0.005, bounded:0.01 or drop:0.01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on the mean of a loss.

    Args:
        kind: `agreement`, the answer differs from the full path's, which needs no labels; `harm`, the full path is
            right and the answer is not; `net`, full path right minus answer right, so that answers made better count;
            `recall`, harm among the samples of one class; `bounded`, what the answer is worse by, 0 to 1, where a task
            grades answers, as ROUGE grades summaries; `drop`, the same, and better answers make up for worse ones.
        alpha: what the mean may be at most, between 0 and 1.
        label: the class of `recall`.

    Raises:
        ConfigError: a value is unknown, out of range, or missing.
    """

    kind: Kind
    alpha: float
    label: str | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"target {self.kind!r} is unknown; known are {', '.join(get_args(Kind))}.")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"target {self.kind}: the bound {self.alpha} must lie between 0 and 1.")
        if (self.kind == "recall") != (self.label is not None):
            raise ConfigError(
                f"target {self.kind}: a class belongs to recall and to no other, as in recall=fraud:0.01."
            )

    @property
    def name(self) -> str:
        """As `parse_target` reads it."""
        label = "" if self.label is None else f"={self.label}"
        return f"{self.kind}{label}:{self.alpha:g}"

    @property
    def bound(self) -> float:
        """Of the mean of `losses_of`, which are from 0 to 1: alpha, for signed ones on the scale that makes -1 a 0."""
        return (1 + self.alpha) / 2 if self.kind in SIGNED else self.alpha

    @property
    def is_plain(self) -> bool:
        """Whether a sample loses all or nothing, 1 or 0."""
        return self.kind in ("agreement", "harm", "recall")

    @property
    def nothing(self) -> float:
        """The loss, on the scale of `losses_of`, of an answer as good as the full path's."""
        return 0.5 if self.kind in SIGNED else 0.0

    def shown(self, mean: float) -> float:
        """A mean of `losses_of` on the scale of alpha."""
        return 2 * mean - 1 if self.kind in SIGNED else mean


def parse_target(text: str) -> Target:
    """A target as it is written on the command line.

    >>> parse_target("recall=fraud:0.005")
    Target(kind='recall', alpha=0.005, label='fraud')

    Raises:
        ConfigError: it is none.
    """
    what, colon, bound = text.rpartition(":")
    kind, equals, label = what.partition("=")
    try:
        alpha = float(bound)
    except ValueError:
        alpha = -1.0
    if not colon or alpha == -1.0:
        raise ConfigError(f"target {text!r} is none; write {_TEXT}.")
    return Target(kind=kind, alpha=alpha, label=label if equals else None)  # type: ignore[arg-type]  # checked there


def losses_of(
    target: Target,
    answers: Integers,
    full: Integers,
    *,
    truth: Integers | None = None,
    labels: tuple[str, ...] = (),
    lost: Floats | None = None,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Losses in [0, 1] (samples, ...), and which samples count (samples,).

    Args:
        target: what is promised.
        answers: (samples,) or (samples, settings), classes.
        full: (samples,), the full path's.
        truth: (samples,); None if unknown.
        labels: names of the classes.
        lost: grade of the full path's answer minus that of each of `answers`, -1 to 1, of their shape; for `bounded`
            and `drop`.

    Raises:
        InputError: the target needs labels or losses that are not there, or no sample of its class.
    """
    shape = (len(full),) + (1,) * (answers.ndim - 1)
    everyone = np.ones(len(full), bool)
    if target.kind in ("bounded", "drop"):
        if lost is None or lost.shape != answers.shape or not (np.abs(lost) <= 1).all():
            raise InputError(
                f"target {target.name} needs answers that are graded from 0 to 1, as summaries are where the data has "
                "abstracts. Without grades agreement can be promised."
            )
        return np.asarray((1 + lost) / 2 if target.kind == "drop" else np.maximum(lost, 0), np.float64), everyone
    if target.kind == "agreement":
        return (answers != full.reshape(shape)).astype(np.float64), everyone
    if truth is None:
        raise InputError(
            f"target {target.name} needs labels, and the data has none. Without labels agreement can be promised "
            f"(agreement:{target.alpha:g}), which bounds the harm as well."
        )
    if len(np.unique(truth)) < 2:
        raise InputError(f"target {target.name}: all {len(truth):,} samples are of one class. Give data with others.")
    right, full_right = answers == truth.reshape(shape), (full == truth).reshape(shape)
    if target.kind == "net":
        return (1 + full_right.astype(np.float64) - right) / 2, everyone
    harm = (full_right & ~right).astype(np.float64)
    if target.kind == "harm":
        return harm, everyone
    if target.label not in labels:
        raise InputError(f"target {target.name}: there is no class {target.label!r}; there are {', '.join(labels)}.")
    own = truth == labels.index(target.label)
    if not own.any():
        raise InputError(f"target {target.name}: no sample is of the class {target.label!r}. Give data with some.")
    return harm, own
