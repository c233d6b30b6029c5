"""The comparison of the demo: one document, the same weights, each kind of attention in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trilevel.applications.documents.encoded import Encoded
from trilevel.applications.documents.materialised import longest_that_fits
from trilevel.applications.documents.measure import LIMIT_S, Attention, Job, Measured, measure, save_encoded
from trilevel.applications.documents.memory import free_bytes

# where a system does not say how much memory is free
_CAUTIOUS_BYTES = 2 * 2**30

Tell = Callable[[str, float], None]
"""Told what is being done, and the share of the whole that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was measured; peaks are those of whole processes.

    `trilevel_short` is trilevel at the length of `materialised` where that had to be shorter than the document;
    `focus` is absent for a model without focus, `bfloat16` where the processor has none, `int8` where no runtime is
    installed or the model is not the one that the artifact holds.
    """

    empty: Measured
    trilevel: Measured
    sdpa: Measured
    materialised: Measured
    trilevel_short: Measured | None = None
    focus: Measured | None = None
    bfloat16: Measured | None = None
    int8: Measured | None = None

    @property
    def speedup(self) -> float | None:
        """Seconds of SDPA over seconds of trilevel; a lower bound when SDPA was stopped."""
        ours, theirs = self.trilevel.median_s, self.sdpa.median_s
        if theirs is None and self.is_lower_bound:
            theirs = LIMIT_S
        return None if ours is None or theirs is None else theirs / ours

    @property
    def is_lower_bound(self) -> bool:
        """Whether SDPA was stopped for taking too long."""
        return self.sdpa.stopped.startswith("stopped")

    @property
    def memory_ratio(self) -> float | None:
        """Peak of trilevel over peak of materialised attention at the same length, each above the empty process."""
        return self._ratio(self.trilevel_short or self.trilevel, self.materialised)

    @property
    def memory_vs_sdpa(self) -> float | None:
        """Peak of trilevel over peak of SDPA, each above the empty process."""
        return self._ratio(self.trilevel, self.sdpa)

    def above_empty(self, measured: Measured) -> int | None:
        """Peak memory above the empty process, at least one byte; that of a runtime is the same process before."""
        empty = measured.loaded_bytes if measured.attention == "int8" else self.empty.peak_memory_bytes
        if measured.peak_memory_bytes is None or empty is None:
            return None
        return max(1, measured.peak_memory_bytes - empty)

    def _ratio(self, ours: Measured, theirs: Measured) -> float | None:
        numerator, denominator = self.above_empty(ours), self.above_empty(theirs)
        return None if numerator is None or denominator is None else numerator / denominator


def compare(
    encoded: Encoded,
    *,
    num_heads: int,
    has_focus: bool,
    has_bfloat16: bool = False,
    has_int8: bool = False,
    model: Path | None,
    threads: int,
    memory_bytes: int | None = None,
    tell: Tell = lambda text, share: None,
) -> Comparison:
    """Measure every contender, one after the other.

    Materialised attention runs on the whole document if its weights fit into `memory_bytes` (half of the free memory by
    default), else on the longest beginning that fits, and trilevel once more on the same.

    Raises:
        ImplementationError: a process failed, and not for want of time or memory.
    """
    memory_bytes = (free_bytes() or _CAUTIOUS_BYTES) // 2 if memory_bytes is None else memory_bytes
    fits = min(encoded.num_tokens, longest_that_fits(num_heads, memory_bytes))
    # a cut keeps whole units, and the first of them in any case
    is_short = encoded.cut(fits).num_tokens < encoded.num_tokens
    plan: dict[str, tuple[Attention, int, str]] = {
        "empty": ("empty", encoded.num_tokens, "the process with nothing to do"),
        "trilevel": ("trilevel", encoded.num_tokens, "trilevel"),
        "sdpa": ("sdpa", encoded.num_tokens, "dense attention, SDPA"),
        "materialised": ("materialised", fits, "dense attention, materialised"),
    }
    if has_focus:
        plan["focus"] = ("focus", encoded.num_tokens, "trilevel with focus")
    if has_bfloat16:
        plan["bfloat16"] = ("bfloat16", encoded.num_tokens, "trilevel in bfloat16")
    if has_int8:
        plan["int8"] = ("int8", encoded.num_tokens, "trilevel in INT8, without torch")
    if is_short:
        plan["trilevel_short"] = ("trilevel", fits, "trilevel at the length of materialised attention")
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="trilevel-demo-") as folder:
        document = Path(folder) / "document.npz"
        save_encoded(document, encoded)
        for number, (name, (attention, tokens, text)) in enumerate(plan.items()):
            job = Job(
                attention=attention,
                document=str(document),
                model=None if model is None else str(model),
                max_tokens=tokens,
                threads=threads,
            )
            found[name] = measure(job, on_pass=_Steps(tell, text, number, len(plan)))
    return Comparison(**found)


class _Steps:
    """Turns the passes of one process into a share of the whole; how many there will be is not known."""

    def __init__(self, tell: Tell, text: str, number: int, total: int) -> None:
        self._tell, self._text, self._number, self._total = tell, text, number, total
        self._left = 1.0
        self._report()

    def __call__(self) -> None:
        # each pass takes a quarter of what is left
        self._left *= 0.75
        self._report()

    def _report(self) -> None:
        self._tell(self._text, (self._number + 1 - self._left) / self._total)


def agreement(ours: list[int], theirs: list[int]) -> float:
    """Jaccard index of two summaries: sentences in both over sentences in either.

    >>> agreement([1, 5, 8], [1, 8, 9])
    0.5
    """
    either = set(ours) | set(theirs)
    return len(set(ours) & set(theirs)) / len(either) if either else 1.0


def rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Spearman's correlation of two score vectors, ties by position; None for fewer than two.

    >>> rank_correlation(np.array([1.0, 2.0, 5.0]), np.array([0.1, 0.3, 0.2]))
    0.5
    """
    if len(ours) < 2:
        return None
    ranks = [np.argsort(np.argsort(scores, kind="stable"), kind="stable").astype(float) for scores in (ours, theirs)]
    n = len(ours)
    return float(1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (n * (n**2 - 1)))
