"""Ranks of what was to be found, recall and MRR, and ratios of recalls with paired bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 2_000
Array = npt.NDArray[np.float64]


def ranks(queries: Tensor, candidates: Tensor) -> npt.NDArray[np.int64]:
    """Rank of candidate i for query i by cosine, from 1; a tie or a value that is no number counts against it.

    >>> import torch
    >>> ranks(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    array([1, 1])
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T
    own = similarity.diagonal()[:, None]
    return (~(similarity < own)).sum(1).numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Ranks of one variant.

    Args:
        ranks: of each query's own candidate, (queries,).
        documents: which document each query is from, (queries,).
        candidates: among which it was looked for.
    """

    ranks: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    candidates: int

    def recall(self, most: int) -> float:
        """Share of the queries whose own candidate is among the first `most`."""
        return float((self.ranks <= most).mean())

    @property
    def mrr(self) -> float:
        """Mean of 1 / rank."""
        return float((1 / self.ranks).mean())

    def sums(self, most: int) -> tuple[Array, Array]:
        """Hits and queries of each document."""
        count = int(self.documents.max()) + 1
        hits = np.bincount(self.documents, weights=self.ranks <= most, minlength=count)
        return hits.astype(np.float64), np.bincount(self.documents, minlength=count).astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One recall over another, with the interval in which 95% of the resampled ones lie."""

    value: float
    low: float
    high: float


def recall_ratio(this: Found, other: Found, *, most: int) -> Ratio:
    """Recall of `this` over that of `other` on the same queries; documents are drawn anew with everything of theirs.

    Where `other` finds nothing it counts as one hit, so that the ratio is a number; where neither does the ratio is 1.
    """
    assert np.array_equal(this.documents, other.documents)
    (mine, _), (theirs, _) = this.sums(most), other.sums(most)
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(mine), (RESAMPLES, len(mine)))
    resampled = [_ratio(mine[own].sum(), theirs[own].sum()) for own in drawn]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Ratio(value=_ratio(mine.sum(), theirs.sum()), low=float(low), high=float(high))


def mean_interval(values: Array) -> tuple[float, float]:
    """The interval in which 95% of the means of resampled values lie."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _ratio(mine: float, theirs: float) -> float:
    return float(mine / max(theirs, 1)) if mine or theirs else 1.0
