"""The choice between paths of their own and one for all, on tables whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from tests.routing.samples import FAMILIES, FULL, MS, make_outcomes
from trilevel.routing import rivals
from trilevel.routing.decision import DYNAMIC, Parts, Promise, answers, decide, fixed_settings
from trilevel.routing.outcomes import Outcomes
from trilevel.routing.router import choose
from trilevel.routing.targets import Target

PROMISE = Promise(targets=[Target(kind="harm", alpha=0.01)], delta=0.05, labels=("a", "b", "c"))
PARTS = Parts(tune=make_outcomes(1_501, seed=1), prove=make_outcomes(3_001, seed=2), test=make_outcomes(4_001, seed=3))
FEATURES = ("difficulty", "noise")


def times(outcomes: Outcomes, batch: int) -> Mapping[str, np.ndarray]:
    """A batch takes half of the time that its samples take alone."""
    share = 1.0 if batch == 1 else 0.5
    return {path: np.full(len(outcomes), share * ms) for path, ms in MS.items()}


def test_routing_pays_and_is_proved() -> None:
    found = decide(PARTS, PROMISE, FAMILIES, FEATURES, times, batches=(1, 8))
    assert found.kind == DYNAMIC
    assert found.certified is not None
    rows = {row.name: row for row in found.rows}
    # fixed paths below the full one lose too much, and the full one is dear
    assert rows[FULL].is_proved
    assert not rows["int8/1"].is_proved
    assert not rows["int8/2"].is_proved
    ours = rows["ours"]
    assert ours.is_proved
    assert ours.loss <= 0.01
    assert ours.ms[1] < 0.5 * rows[FULL].ms[1]
    assert ours.ms[8] == pytest.approx(0.5 * ours.ms[1])
    assert rows["oracle"].ms[1] < ours.ms[1]
    assert rows["oracle"].loss == 0
    assert rows["random, the same shares"].loss > 2 * ours.loss
    assert sum(ours.shares.values()) == pytest.approx(1)
    # what is known of the input says little here
    assert rows["neighbours"].ms[1] > ours.ms[1]
    np.testing.assert_allclose(sum(ours.shares[path] * MS[path] for path in MS), ours.ms[1], rtol=0.2)


def test_where_the_last_segment_is_as_good_one_path_is_taken_for_all() -> None:
    def perfect(outcomes: Outcomes) -> Outcomes:
        predictions, margins = outcomes.predictions.copy(), outcomes.margins.copy()
        predictions[:, 2] = predictions[:, 3]
        # the inner heads are no surer where they are right
        margins[:, :2] = np.random.default_rng(0).random((len(outcomes), 2))
        return replace(outcomes, predictions=predictions, margins=margins)

    parts = Parts(tune=perfect(PARTS.tune), prove=perfect(PARTS.prove), test=perfect(PARTS.test))
    found = decide(parts, PROMISE, FAMILIES, FEATURES, times)
    assert found.kind in ("int8/3", DYNAMIC)
    rows = {row.name: row for row in found.rows}
    assert rows["int8/3"].is_proved
    chosen = choose(parts.test, found.router, found.setting)
    assert chosen.cost(parts.test, found.router, MS).mean() == pytest.approx(rows["int8/3"].ms[1], rel=0.05)


def test_too_few_samples_refuse_and_run_the_full_path() -> None:
    parts = replace(PARTS, prove=PARTS.prove.rows(slice(0, 211)))
    found = decide(parts, PROMISE, FAMILIES, FEATURES, times)
    assert found.certified is None
    assert "needs 88 more samples" in found.refusal
    column = PARTS.test.column(FULL)
    assert (choose(PARTS.test, found.router, found.setting).column == column).all()


def test_other_models_are_shown_beside_and_change_nothing() -> None:
    def other(outcomes: Outcomes, wrong: float) -> Outcomes:
        """A model with one path that answers as the full path does but for a share."""
        column = outcomes.full_predictions.copy()
        column[: int(wrong * len(column))] += 1
        full = [outcomes.column(FULL)]
        return replace(
            outcomes, paths=(FULL,), predictions=column[:, None] % 3, margins=outcomes.margins[:, full], grades=None
        )

    def with_others(outcomes: Outcomes, batch: int) -> Mapping[str, np.ndarray]:
        return {**times(outcomes, batch), "good": np.full(len(outcomes), 4.0), "bad": np.full(len(outcomes), 0.1)}

    statics = {
        "good": (other(PARTS.prove, 0.0), other(PARTS.test, 0.005)),
        "bad": (other(PARTS.prove, 0.05), other(PARTS.test, 0.05)),
    }
    alone = decide(PARTS, PROMISE, FAMILIES, FEATURES, times)
    found = decide(PARTS, PROMISE, FAMILIES, FEATURES, with_others, statics=statics)
    assert found.rows[: len(alone.rows)] == alone.rows
    assert found.setting == alone.setting
    good, bad = found.rows[len(alone.rows) :]
    assert (good.name, good.kind, good.is_proved, good.ms, bad.is_proved) == ("good", "static", True, {1: 4.0}, False)
    # harm alone: where the full path was right
    assert 0.004 < good.loss <= 0.005
    assert 0.04 < bad.loss <= 0.05
    assert bad.shares["bad"] == 1.0


def test_other_models_with_graded_answers() -> None:
    grades = np.tile([0.3, 0.4, 0.45, 0.5], (2_000, 1))
    columns = np.tile(np.arange(4), (2_000, 1))
    outcomes = replace(make_outcomes(2_000), predictions=columns, grades=grades, labels=None)
    theirs = replace(
        outcomes,
        paths=(FULL,),
        predictions=columns[:, :1],
        margins=outcomes.margins[:, :1],
        grades=np.full((2_000, 1), 0.47),
    )
    found = outcomes.beside("small", theirs, is_class=False)
    assert found.full == FULL
    assert (found.predictions[:, -1] == 4).all()
    lost = found.lost(found.predictions[:, -1:])
    assert lost is not None
    np.testing.assert_allclose(lost, 0.03)
    assert outcomes.beside("small", replace(theirs, grades=None), is_class=False).grades is None


def test_fixed_settings_send_all_one_way() -> None:
    router = decide(PARTS, PROMISE, FAMILIES, FEATURES, times).router
    order = fixed_settings(router, MS)
    assert [name for name, _ in order] == [FULL, "int8/3", "int8/2", "int8/1"]
    for name, setting in order:
        column = PARTS.test.column(name)
        assert (choose(PARTS.test, router, setting).column == column).all()
        np.testing.assert_array_equal(answers(PARTS.test, router, [setting])[:, 0], PARTS.test.predictions[:, column])


def test_rivals_by_their_definitions() -> None:
    rng = np.random.default_rng(29)
    known, losses, features = rng.standard_normal((101, 2)), rng.random((101, 3)), rng.standard_normal((7, 2))
    found = rivals.neighbour_harm(known, losses, features)
    deviation = known.std(0)
    for row in range(7):
        far = (((known - features[row]) / deviation) ** 2).sum(1)
        near = np.argsort(far)[: rivals.NEIGHBOURS]
        np.testing.assert_allclose(found[row], losses[near].mean(0))
    edges = np.quantile(known[:, 0], np.linspace(0, 1, 11)[1:-1])
    binned = rivals.binned_harm(known[:, 0], losses, features[:, 0])
    for row in range(7):
        own = np.searchsorted(edges, known[:, 0]) == np.searchsorted(edges, features[row, 0])
        np.testing.assert_allclose(binned[row], losses[own].mean(0))
    harm, ms = np.array([[0.3, 0.1, 0.9]]), np.array([[1.0, 2.0, 4.0]])
    assert [int(rivals.by_harm(harm, ms, 2, price)[0]) for price in (0.0, 0.3, 0.9)] == [2, 1, 0]
    assert rivals.oracle(np.array([[1.0, 0.0, 0.0]]), ms).tolist() == [1]
