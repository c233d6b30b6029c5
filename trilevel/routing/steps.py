"""Steps: the segments of a family of paths, as any runtime offers them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
"""By name; the first axis of each is the batch."""


MAX_PLACES = 8_192
"""Most places, rows times their padded length, that run at once: what bounds the memory. A longer row runs alone."""


def rows_at_once(length: int) -> int:
    """Rows of a padded length that run at once; larger batches take one such piece after another."""
    return max(1, MAX_PLACES // length)


class Steps(Protocol):
    """The segments of one family on one runtime, which are run one after another."""

    @property
    def num_segments(self) -> int:
        """How many there are, >= 1."""
        ...

    def run(self, segment: int, arrays: Arrays) -> tuple[Arrays, Array]:
        """Run one segment over a batch; arrays are not written to, and samples do not see each other.

        Args:
            segment: from 0.
            arrays: the collated inputs of samples for segment 0, else what the segment before gave as state. A state
                holds all that the next segment reads, a padding mask too.

        Returns:
            The state (what the last segment gives is not read), and the outputs (batch, ...) of the head behind the
            segment, of one shape and type for all heads of a family.
        """
        ...
