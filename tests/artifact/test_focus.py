"""Focus between segments: which units go on, where their tokens stand, and back again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilevel.artifact.runtime.focus import LEAST_TOKENS, OUT, chosen_units, focused, kept_tokens, scattered


@pytest.mark.parametrize(
    ("tokens", "kept"), [(1, 1), (512, 512), (513, 512), (2_560, 512), (2_561, 513), (5_120, 1_024)]
)
def test_tokens_that_go_on(tokens: int, kept: int) -> None:
    assert LEAST_TOKENS == 512
    assert kept_tokens(tokens, 0.2) == kept


def test_units_are_chosen_by_score_while_they_fit() -> None:
    scores, lengths = np.array([0.5, 3.0, 2.0, 2.0, 1.0]), np.array([4, 9, 6, 5, 0])
    assert chosen_units(scores, lengths, 14).tolist() == [1, 3]
    assert chosen_units(scores, lengths, 15).tolist() == [1, 2]
    assert chosen_units(scores, lengths, 19).tolist() == [0, 1, 2]
    # a unit without tokens is padding, whatever its score
    assert chosen_units(np.array([0.0, 9.0]), np.array([3, 0]), 99).tolist() == [0]


@given(st.integers(0, 10_000))
def test_what_goes_on_is_what_the_units_were(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, units, dim, around = int(rng.integers(1, 4)), int(rng.integers(5, 60)), 3, (int(rng.integers(0, 3)), 1)
    lengths = rng.integers(1, 40, (batch, units))
    # rows have units of padding at their end
    for row in range(batch):
        lengths[row, int(rng.integers(1, units + 1)) :] = 0
    ends = lengths.cumsum(1)
    tokens = int(ends.max())
    hidden = rng.normal(size=(batch, around[0] + tokens + around[1], dim))
    state = {"hidden": hidden, "unit_ends": ends, "unit_prior": rng.normal(size=(batch, units)),
             "words": rng.normal(size=(batch, units, 2))}  # fmt: skip
    scores = rng.normal(size=(batch, units))
    found = focused(state, scores, 0.3, around)
    budget = kept_tokens(tokens, 0.3)
    assert found["hidden"].shape == (batch, around[0] + budget + around[1], dim)
    for row in range(batch):
        kept = found["kept_units"][row]
        kept = kept[kept >= 0]
        assert kept.tolist() == chosen_units(scores[row], lengths[row], budget).tolist()
        start, own = 0, found["unit_ends"][row]
        np.testing.assert_array_equal(found["hidden"][row, : around[0]], hidden[row, : around[0]])
        for place, unit in enumerate(kept):
            before = int(ends[row, unit] - lengths[row, unit])
            ours = found["hidden"][row, around[0] + start : around[0] + own[place]]
            np.testing.assert_array_equal(ours, hidden[row, around[0] + before : around[0] + ends[row, unit]])
            for name in ("unit_prior", "words"):
                np.testing.assert_array_equal(found[name][row, place], state[name][row, unit])
            start = int(own[place])
        # behind the last token the special one, and nothing in units of padding
        np.testing.assert_array_equal(found["hidden"][row, around[0] + start], hidden[row, around[0] + ends[row].max()])
        assert (own[len(kept) :] == start).all()
    if tokens <= LEAST_TOKENS:
        assert (found["unit_ends"][:, -1] == ends[:, -1]).all()


def test_scores_come_back_to_their_units() -> None:
    kept = np.array([[1, 3, -1, -1], [0, 1, 2, -1]])
    scores = np.array([[5.0, 6.0, 0.0, 0.0], [1.0, 2.0, 3.0, 9.0]])
    np.testing.assert_array_equal(scattered(scores, kept), [[OUT, 5, OUT, 6], [1, 2, 3, OUT]])
