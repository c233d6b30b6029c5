"""The table of outcomes: what it holds, what it refuses, how it is kept and split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.routing.samples import make_outcomes
from trilevel.errors import InputError
from trilevel.routing.outcomes import load_outcomes, split_groups


@pytest.mark.parametrize("has_labels", [True, False])
def test_a_table_comes_back(tmp_path: Path, *, has_labels: bool) -> None:
    outcomes = make_outcomes(17, has_labels=has_labels)
    outcomes.save(tmp_path / "deep" / "outcomes.npz")
    found = load_outcomes(tmp_path / "deep" / "outcomes.npz")
    assert found.paths == outcomes.paths
    assert found.full == outcomes.full
    for name in ("predictions", "margins", "features", "lengths", "groups", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(outcomes, name))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["outcomes.npz"]


def test_grades_belong_to_answers(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    plain = make_outcomes(19, has_labels=False)
    assert plain.lost(plain.predictions) is None
    # answers are columns: those of the first path that answers alike
    grades, columns = rng.random((19, 4)), rng.integers(0, 4, (19, 4))
    outcomes = replace(plain, predictions=columns, grades=grades)
    found = outcomes.lost(columns[:, :2])
    assert found is not None
    for row in range(19):
        full = grades[row, columns[row, 3]]
        np.testing.assert_allclose(found[row], [full - grades[row, columns[row, path]] for path in range(2)])
    outcomes.save(tmp_path / "outcomes.npz")
    np.testing.assert_array_equal(load_outcomes(tmp_path / "outcomes.npz").grades, grades)
    np.testing.assert_array_equal(outcomes.rows(slice(3, 5)).grades, grades[3:5])


def test_rows_and_columns() -> None:
    outcomes = make_outcomes(13)
    some = outcomes.rows(np.array([5, 2]))
    assert len(some) == 2
    assert some.labels is not None
    assert outcomes.labels is not None
    np.testing.assert_array_equal(some.labels, outcomes.labels[[5, 2]])
    np.testing.assert_array_equal(some.margins, outcomes.margins[[5, 2]])
    np.testing.assert_array_equal(outcomes.full_predictions, outcomes.predictions[:, 3])


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_in_two_parts(seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, 41, 307)
    parts = split_groups(groups, (0.3, 0.5, 0.2), seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(307))
    own = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, own)) == len(set.union(*own))
    assert [len(one) for one in own] == pytest.approx([0.3 * 41, 0.5 * 41, 0.2 * 41], abs=1.5)
    again = split_groups(groups, (0.3, 0.5, 0.2), seed=seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


# error messages


def test_arrays_that_do_not_belong_together() -> None:
    outcomes = make_outcomes(11)
    with pytest.raises(InputError, match=r"11 samples and 4 paths do not go with margins \(7, 4\)"):
        replace(outcomes, margins=outcomes.margins[:7])
    with pytest.raises(InputError, match="the full path 'int8/9' is none of int8/1"):
        replace(outcomes, full="int8/9")
    with pytest.raises(InputError, match="there is no path 'int8/7'; there are int8/1, int8/2"):
        outcomes.column("int8/7")


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.npz"
    with pytest.raises(InputError, match="cannot be read"):
        load_outcomes(path)
    make_outcomes(5).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="Remove it; it is then computed again"):
        load_outcomes(path)
