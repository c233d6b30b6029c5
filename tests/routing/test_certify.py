"""Fixed-sequence testing: what comes out is proved, and seldom wrong; refusals count right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from trilevel.errors import CertificateError, ConfigError
from trilevel.routing.certify import certify, prove, samples_missing
from trilevel.routing.evidence import binomial_p_value
from trilevel.routing.targets import Kind, Target

HARM = Target(kind="harm", alpha=0.01)


def everyone(count: int) -> np.ndarray:
    return np.ones(count, bool)


def run(losses: np.ndarray, *, delta: float = 0.05, groups: np.ndarray | None = None) -> int:
    own = np.arange(len(losses)) if groups is None else groups
    return certify([HARM], [(losses, everyone(len(losses)))], delta=delta, groups=own).setting


def table(risks: list[float], samples: int, seed: int) -> np.ndarray:
    """Nested errors: a cheaper setting loses wherever a safer one does."""
    luck = np.random.default_rng(seed).random(samples)
    return (luck[:, None] < np.array(risks)).astype(float)


# definition


@settings(deadline=None, max_examples=60)
@given(errors=st.lists(st.integers(0, 12), min_size=1, max_size=9), samples=st.integers(200, 1_300))
def test_the_last_setting_before_the_first_failure(errors: list[int], samples: int) -> None:
    losses = np.zeros((samples, len(errors)))
    for column, count in enumerate(errors):
        losses[:count, column] = 1
    passes = [binomial_p_value(count, samples, 0.01) <= 0.05 for count in errors]
    if not passes[0]:
        with pytest.raises(CertificateError):
            run(losses)
        return
    wanted = passes.index(False) - 1 if False in passes else len(errors) - 1
    assert run(losses) == wanted


def test_all_targets_must_pass() -> None:
    losses = table([0.0, 0.001, 0.004, 0.02], 4_001, 1)
    recall = Target(kind="recall", alpha=0.01, label="b")
    few = np.arange(4_001) < 320
    rare = losses.copy()
    rare[:3, 2:] = 1
    both = certify([HARM, recall], [(losses, everyone(4_001)), (rare, few)], delta=0.05, groups=np.arange(4_001))
    assert run(losses) == 2
    assert both.setting == 1
    assert [proof.target for proof in both.proofs] == ["harm:0.01", "recall=b:0.01"]
    assert both.proofs[1].units == 320


# invariants


def test_promises_hold_where_a_plain_search_breaks_them() -> None:
    risks = [0.0, 0.004, 0.0075, 0.0095, 0.0102, 0.011, 0.013]
    broken, naive, runs = 0, 0, 600
    for seed in range(runs):
        losses = table(risks, 2_003, seed)
        broken += risks[run(losses)] > 0.01
        naive += risks[int(np.flatnonzero(losses.mean(0) <= 0.01)[-1])] > 0.01
    assert (beta.ppf(0.05, broken, runs - broken + 1) if broken else 0.0) <= 0.05
    assert naive / runs > 0.3


def test_copies_of_a_sample_prove_nothing_more() -> None:
    losses = np.zeros((200, 1))
    with pytest.raises(CertificateError, match="99 more samples"):
        run(losses)
    copies, groups = np.repeat(losses, 5, axis=0), np.repeat(np.arange(200), 5)
    with pytest.raises(CertificateError, match="99 more samples"):
        run(copies, groups=groups)
    assert run(copies) == 0


def test_a_group_is_one_unit() -> None:
    losses, groups = np.array([1.0, 0.0, 0.0, 0.0, 1.0]), np.array([7, 7, 3, 3, 5])
    bounded = prove(Target(kind="bounded", alpha=0.01), losses, everyone(5), groups)
    assert (bounded.units, bounded.errors) == (3, None)
    assert bounded.mean == pytest.approx((0.5 + 0 + 1) / 3)
    # of plain losses one member is drawn
    drawn = prove(HARM, losses, everyone(5), groups)
    assert drawn.units == 3
    assert drawn.errors in (1, 2)
    some = prove(HARM, losses, np.array([False, True, True, True, True]), groups)
    assert (some.units, some.errors) == (3, 1)


def test_the_members_drawn_lose_as_their_groups_do() -> None:
    rng = np.random.default_rng(31)
    groups = rng.integers(0, 20_011, 60_000)
    losses = (rng.random(60_000) < 0.02).astype(float)
    names, inverse = np.unique(groups, return_inverse=True)
    mean = (np.bincount(inverse, losses) / np.bincount(inverse)).mean()
    proof = prove(HARM, losses, everyone(60_000), groups)
    assert proof.units == len(names)
    assert proof.mean == pytest.approx(mean, abs=4 * np.sqrt(0.02 / len(names)))


# refusal


@settings(deadline=None, max_examples=60)
@given(errors=st.integers(0, 9), samples=st.integers(10, 1_500), alpha=st.sampled_from([0.01, 0.02, 0.05]))
def test_refusals_ask_for_the_right_number(errors: int, samples: int, alpha: float) -> None:
    target = Target(kind="harm", alpha=alpha)
    losses = np.zeros(samples)
    losses[:errors] = 1
    missing = samples_missing(target, losses, 0.05)
    if not missing:
        assert binomial_p_value(errors, samples, alpha) <= 0.05
        return
    assert binomial_p_value(errors, samples + missing, alpha) <= 0.05
    assert binomial_p_value(errors, samples + missing - 1, alpha) > 0.05
    with pytest.raises(CertificateError, match=rf"needs {missing:,} more samples that lose nothing; {errors} of the"):
        certify([target], [(losses[:, None], everyone(samples))], delta=0.05, groups=np.arange(samples))


@pytest.mark.parametrize("kind", ["net", "bounded"])
def test_refusals_of_bets_ask_for_what_suffices(kind: Kind) -> None:
    target = Target(kind=kind, alpha=0.02)
    rng = np.random.default_rng(37)
    units = 0.5 + 0.5 * rng.choice([-1, 0, 1], 101, p=[0.02, 0.95, 0.03]) if kind == "net" else rng.beta(0.2, 9, 101)
    missing = samples_missing(target, units, 0.05)
    assert missing > 0
    more = np.concatenate([units, np.full(missing, target.nothing)])
    assert samples_missing(target, more, 0.05) == 0
    assert samples_missing(target, more[:-1], 0.05) == 1


def test_the_first_setting_is_never_returned_unproved() -> None:
    with pytest.raises(CertificateError, match=r"not certified at a confidence of 0\.95"):
        run(np.ones((500, 3)))
    bounded = Target(kind="bounded", alpha=0.1)
    with pytest.raises(CertificateError, match=r"more samples that lose nothing; some of the 50 given lose"):
        certify([bounded], [(np.full((50, 2), 0.5), everyone(50))], delta=0.05, groups=np.arange(50))
    recall = Target(kind="recall", alpha=0.01, label="b")
    with pytest.raises(CertificateError, match=r"recall=b:0\.01 needs 299 more samples"):
        certify([recall], [(np.zeros((5, 1)), np.zeros(5, bool))], delta=0.05, groups=np.arange(5))


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="delta=0 must lie between 0 and 1"):
        run(np.zeros((5, 1)), delta=0)
    with pytest.raises(ConfigError, match="a setting at least"):
        run(np.zeros((5, 0)))
