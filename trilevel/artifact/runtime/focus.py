"""Focus between segments: only the best units of a document go on, moved together, so that deeper segments see less.

The graphs before and behind stay those of whole documents; what goes on is chosen here, from the scores of the head
that has just answered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LEAST_TOKENS = 512
"""A document of fewer tokens goes on as it is, and this many of a longer one always do."""
OUT = -1e4
"""Score of a unit that is padding or did not go on."""
KEPT, HIDDEN, ENDS = "kept_units", "hidden", "unit_ends"


def kept_tokens(num_tokens: int, fraction: float) -> int:
    """Tokens that go on, of a document padded to `num_tokens`."""
    return min(num_tokens, max(LEAST_TOKENS, int(np.ceil(fraction * num_tokens))))


def chosen_units(scores: Array, lengths: Array, budget: int) -> npt.NDArray[np.int64]:
    """Units with the best scores (units,) whose tokens (units,) fit into a budget, in the order of the document.

    Ties by place. A unit that does not fit is passed over; one without tokens is none.
    """
    chosen, used = [], 0
    for unit in np.argsort(-scores, kind="stable"):
        if lengths[unit] > 0 and used + lengths[unit] <= budget:
            chosen.append(unit)
            used += int(lengths[unit])
    return np.sort(np.array(chosen, np.int64))


def focused(state: dict[str, Array], scores: Array, fraction: float, around: tuple[int, int]) -> dict[str, Array]:
    """What the next segment reads when only the best units go on.

    Args:
        state: `hidden` (batch, places, dim), special tokens included; `unit_ends` (batch, units), where each unit ends
            among the tokens without them; any others (batch, units, ...).
        scores: (batch, units) of the head behind the segment that gave the state.
        fraction: of the tokens that go on.
        around: special tokens before and behind a document.

    Returns:
        The same names, with units moved to the front and padding behind them, and `kept_units` (batch, units) int64:
        the place that each had before, -1 for none.
    """
    before, behind = around
    hidden, ends = state[HIDDEN], state[ENDS]
    budget = kept_tokens(hidden.shape[1] - before - behind, fraction)
    starts = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
    lengths = np.maximum(ends - starts, 0)
    kept = np.full(ends.shape, -1, np.int64)
    made = {name: np.zeros_like(array) for name, array in state.items() if name != HIDDEN}
    thin = np.zeros((len(hidden), before + budget + behind, hidden.shape[2]), hidden.dtype)
    for row in range(len(hidden)):
        units = chosen_units(scores[row], lengths[row], budget)
        kept[row, : len(units)] = units
        places = np.concatenate([np.arange(starts[row, unit], ends[row, unit]) for unit in units])
        end = before + int(ends[row].max())
        taken = np.concatenate([np.arange(before), before + places, end + np.arange(behind)])
        thin[row, : len(taken)] = hidden[row, taken]
        for name, array in made.items():
            array[row, : len(units)] = state[name][row, units]
        made[ENDS][row] = len(places)
        made[ENDS][row, : len(units)] = np.cumsum(lengths[row, units])
    return made | {HIDDEN: thin, KEPT: kept}


def scattered(scores: Array, kept: Array) -> Array:
    """Scores (batch, units) of units that went on, each at the place it had before; `OUT` for the others."""
    found = np.full_like(scores, OUT)
    for row, units in enumerate(kept):
        went = units >= 0
        found[row, units[went]] = scores[row, went]
    return found
