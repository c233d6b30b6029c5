"""The audit: seldom a false alarm, soon a true one, and a state that survives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from trilevel.errors import CertificateError, ConfigError, InputError
from trilevel.routing.audit import Audit, AuditConfig, Ended, power
from trilevel.routing.certificate import SEAL, digest

HASH = "1f" * 32
ALPHA = 0.01


def audit_of(**changes: Any) -> Audit:
    values: dict[str, Any] = {"alpha": ALPHA, "certificate": HASH} | changes
    return Audit(AuditConfig(**values))


def drawn(risk: float, samples: int, seed: int) -> list[float]:
    return [float(luck < risk) for luck in np.random.default_rng(seed).random(samples)]


def lowest_share(count: int, runs: int) -> float:
    """Lower 95% Clopper-Pearson bound of a share."""
    return 0.0 if not count else float(beta.ppf(0.05, count, runs - count + 1))


# definition


def capital_of(losses: list[float], alpha: float) -> float:
    """A gambler who begins a game at every sample with every stake, and keeps the rest of 1 as cash."""
    stakes = [min(0.01, alpha / 2) * (0.5 / min(0.01, alpha / 2)) ** (i / 7) for i in range(8)]

    def cash(count: int) -> float:
        return 1 / (1 + math.log(1 + count))

    total = cash(len(losses) + 1)
    for start in range(len(losses) + 1):
        for stake in stakes:
            factors = (1 - stake + stake * loss / alpha for loss in losses[start:])
            total += (cash(start) - cash(start + 1)) / len(stakes) * math.prod(factors)
    return total


@settings(deadline=None, max_examples=40)
@given(
    losses=st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.05, 0.3]), max_size=61),
    alpha=st.sampled_from([0.002, 0.01, 0.505]),
)
def test_the_capital_is_that_of_all_games(losses: list[float], alpha: float) -> None:
    audit = audit_of(alpha=alpha, delta=1e-300)
    for loss in losses:
        audit.observe(loss)
    assert math.exp(audit.log_capital) == pytest.approx(capital_of(losses, alpha), rel=1e-9)
    assert audit.samples == len(losses)
    assert audit.mean == pytest.approx(np.mean(losses) if losses else 0.0)


def test_the_alarm_is_where_the_capital_reaches_one_over_delta() -> None:
    audit, losses = audit_of(delta=0.05), drawn(0.1, 503, 3)
    count = next(count for count, loss in enumerate(losses, 1) if audit.observe(loss))
    assert audit.is_alarmed
    assert capital_of(losses[:count], ALPHA) >= 20 > capital_of(losses[: count - 1], ALPHA)
    # on average a fair game: what one more loss at a risk of alpha makes of the capital
    some = losses[:13]
    fair = ALPHA * capital_of([*some, 1.0], ALPHA) + (1 - ALPHA) * capital_of([*some, 0.0], ALPHA)
    assert fair == pytest.approx(capital_of(some, ALPHA), rel=1e-12)


def test_power_is_that_of_audits() -> None:
    (row,) = power(ALPHA, [0.07], samples=307, runs=31, seed=5)
    rng = np.random.default_rng((5, 0))
    luck = np.stack([rng.random((31, 1)) for _ in range(307)])[..., 0]
    delays = []
    for run in range(31):
        audit = audit_of()
        delays += [next((t for t, x in enumerate(luck[:, run], 1) if audit.observe(float(x < 0.07))), None)]
    found = [delay for delay in delays if delay is not None]
    assert row.alarmed == len(found) / 31
    assert row.median_samples == np.median(found)


# invariants: the promise


@pytest.mark.parametrize("samples", [10_000, 200])
def test_false_alarms_are_few(samples: int) -> None:
    # 10,000 shadowed requests, and 2% of 10,000
    (row,) = power(ALPHA, [ALPHA], samples=samples, seed=7)
    assert row.alarmed * 200 <= 6


def test_any_time_is_valid() -> None:
    (row,) = power(ALPHA, [ALPHA], delta=0.2, samples=2_003, runs=503, seed=11)
    assert lowest_share(round(row.alarmed * 503), 503) <= 0.2


def test_a_shift_alarms_within_ten_thousand_requests() -> None:
    # of which 2% are shadowed; at once, and after 100,000 calm ones
    for calm in (0, 2_000):
        (row,) = power(ALPHA, [0.1], samples=200, calm=calm, seed=13)
        assert row.alarmed >= 0.9
        assert row.median_samples is not None
        assert row.median_samples < 150


def test_power_grows_with_the_risk() -> None:
    rows = power(ALPHA, [0.0, 0.015, 0.02, 0.05, 0.2], samples=10_007, runs=61, seed=17)
    assert [row.risk for row in rows] == [0.0, 0.015, 0.02, 0.05, 0.2]
    assert (rows[0].alarmed, rows[0].median_samples) == (0.0, None)
    assert rows[1].alarmed > 0.7
    assert all(row.alarmed == 1.0 for row in rows[2:])
    delays = [row.median_samples or 0.0 for row in rows[1:]]
    assert delays == sorted(delays, reverse=True)


@pytest.mark.parametrize("risk", [0.003, 0.03, 0.4])
def test_intervals_hold_at_all_times(risk: float) -> None:
    missed, runs = 0, 41
    for seed in range(runs):
        audit = audit_of(alpha=0.505, delta=0.1)
        for loss in drawn(risk, 211, seed):
            audit.observe(loss)
            low, high = audit.interval
            if not low <= risk <= high:
                missed += 1
                break
    assert lowest_share(missed, runs) <= 0.1


def test_intervals_hold_at_the_certified_risk() -> None:
    held, runs = 0, 200
    for seed in range(runs):
        audit, losses = audit_of(delta=0.05), drawn(ALPHA, 307, seed)
        bounds = []
        for loss, coming in zip(losses, [*losses[1:], 1.0], strict=True):
            audit.observe(loss)
            # the lower bound rises with a loss alone, and the upper one is lowest just before the next
            bounds += [audit.interval] if loss or coming else []
        held += all(low <= ALPHA <= high for low, high in bounds)
    assert held >= 0.95 * runs


@pytest.mark.parametrize(("alpha", "risk"), [(0.01, 0.004), (0.05, 0.02), (0.505, 0.5)])
def test_intervals_shrink(alpha: float, risk: float) -> None:
    audit, losses = audit_of(alpha=alpha), drawn(risk, 3_001, 19)
    assert audit.interval == (0.0, 1.0)
    for loss in losses:
        audit.observe(loss)
    errors, bounds = int(sum(losses)), audit.interval
    assert bounds[0] < risk < bounds[1]
    # what it costs that one may look at any time, and that candidates are a grid
    low, high = beta.ppf([0.005, 0.995], [errors, errors + 1], [3_002 - errors, 3_001 - errors])
    assert bounds[1] - bounds[0] < 2.2 * (high - low)


@settings(deadline=None, max_examples=40)
@given(parts=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 31)), max_size=5))
def test_the_mean_lies_within_whatever_comes(parts: list[tuple[float, int]]) -> None:
    audit = audit_of(alpha=0.5, delta=0.001)
    for loss, count in parts:
        for _ in range(count):
            audit.observe(loss)
    low, high = audit.interval
    assert low <= audit.mean <= high


# which requests


def test_the_share_is_kept_and_the_choice_repeats() -> None:
    ids = [f"request-{number}" for number in range(50_021)]
    audit, other = audit_of(shadow_share=0.02), audit_of(shadow_share=0.02, salt="b")
    chosen = [audit.wants_shadow(one) for one in ids]
    assert sum(chosen) / len(ids) == pytest.approx(0.02, abs=0.003)
    assert [audit_of().wants_shadow(one) for one in ids[:997]] == chosen[:997]
    assert [other.wants_shadow(one) for one in ids] != chosen
    # a smaller share is a part of a larger one
    more = audit_of(shadow_share=0.05)
    assert all(more.wants_shadow(one) for one, is_chosen in zip(ids, chosen, strict=True) if is_chosen)
    assert all(audit_of(shadow_share=1.0).wants_shadow(one) for one in [*ids[:11], "", "\ud800"])


def test_the_choice_does_not_depend_on_the_order() -> None:
    ids, audit = [f"request-{number}" for number in range(2_003)], audit_of()
    chosen = {one for one in ids if audit.wants_shadow(one)}
    audit.observe(1.0)
    shuffled = np.random.default_rng(29).permutation(ids).tolist()
    assert {one for one in shuffled if audit.wants_shadow(one)} == chosen
    assert 0 < len(chosen) < len(ids)


# alarm and reset


def test_an_alarm_stays_until_a_reset() -> None:
    audit = audit_of()
    assert [audit.observe(loss) for loss in (0.0, 1.0, 1.0)] == [False, False, True]
    capital = audit.log_capital
    assert audit.observe(0.0)
    assert (audit.samples, audit.log_capital) == (3, capital)
    audit.reset("new cameras: certified again")
    assert audit.history == (Ended(reason="new cameras: certified again", samples=3, mean=2 / 3, alarmed=True),)
    assert (audit.is_alarmed, audit.samples, audit.mean) == (False, 0, 0.0)
    assert audit.log_capital == pytest.approx(0.0, abs=1e-12)
    assert audit.interval == (0.0, 1.0)
    assert not audit.observe(1.0)


# state


@pytest.mark.parametrize("at", [0, 1, 17, 52])
def test_a_restart_changes_nothing(at: int, tmp_path: Path) -> None:
    losses = [min(1.0, x) for x in np.random.default_rng(23).gamma(0.05, 0.4, 53)]
    whole, part = audit_of(salt="s"), audit_of(salt="s")
    for number, loss in enumerate(losses):
        if number == at:
            part.save(tmp_path / "audit.json")
            part = Audit.load(tmp_path / "audit.json", certificate=HASH)
        if number == 11:
            part.reset("as planned")
            whole.reset("as planned")
        whole.observe(loss)
        part.observe(loss)
    assert part.to_dict() == whole.to_dict()
    assert (part.log_capital, part.interval, part.history) == (whole.log_capital, whole.interval, whole.history)
    assert part.config == whole.config


def test_an_alarm_survives(tmp_path: Path) -> None:
    audit = audit_of()
    for _ in range(3):
        audit.observe(1.0)
    audit.save(tmp_path / "audit.json")
    assert Audit.load(tmp_path / "audit.json", certificate=HASH).is_alarmed


def sealed(**changes: Any) -> str:
    values = {name: value for name, value in audit_of().to_dict().items() if name != SEAL} | changes
    return json.dumps(values | {SEAL: digest(values)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no trilevel-audit of version 1 can be read there. Start a new audit"),
        ("[]", "no trilevel-audit of version 1"),
        (sealed()[:-200], "no trilevel-audit of version 1"),
        (sealed(version=2), "no trilevel-audit of version 1"),
        (sealed().replace('"samples": 0', '"samples": 9'), r"damaged \(it was changed after it was written"),
        (sealed().replace('"is_alarmed": false', '"is_alarmed": NaN'), "damaged"),
        (sealed(wealth=[0.0] * 7), r"damaged \(wealth has the shape \(7,\)"),
        (sealed(too_low=None), r"damaged \(too_low has the shape"),
        (sealed(samples="9"), "damaged .samples='9'"),
        (sealed(is_alarmed=0), "damaged .is_alarmed=0"),
        (sealed(config={"alpha": 2.0, "certificate": HASH}), "damaged .*alpha=2.0 must lie between 0 and 1"),
        (sealed(config=None), "damaged"),
        (sealed(history=[{"why": ""}]), "damaged"),
    ],
)
def test_states_that_are_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "audit.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CertificateError, match=words):
        Audit.load(path, certificate=HASH)


def test_no_state_and_that_of_another_certificate(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="no trilevel-audit of version 1 can be read there"):
        Audit.load(tmp_path / "none.json", certificate=HASH)
    audit_of().save(tmp_path / "audit.json")
    with pytest.raises(CertificateError, match="of the certificate 1f1f1f1f1f1f and not of 2e2e2e2e2e2e"):
        Audit.load(tmp_path / "audit.json", certificate="2e" * 32)


# error messages


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 0.0}, r"alpha=0\.0 must lie between 0 and 1"),
        ({"alpha": float("nan")}, "alpha=nan must lie between 0 and 1"),
        ({"delta": 1.0}, r"delta=1\.0 must lie between 0 and 1"),
        ({"shadow_share": 0.0}, r"shadow_share=0\.0 must lie in \(0, 1\]"),
        ({"shadow_share": 1.5}, r"shadow_share=1\.5 must lie in \(0, 1\]"),
        ({"certificate": ""}, "certificate is empty; give the hash"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        audit_of(**changes)


def test_wrong_arguments() -> None:
    for loss in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"must lie in \[0, 1\], got .* Give 0\.0 for what took the full path"):
            audit_of().observe(loss)
    with pytest.raises(ConfigError, match="reason is empty; say what was done about the risk"):
        audit_of().reset("  ")
    for wrong in ({"samples": 0}, {"runs": 0}, {"calm": -1}):
        with pytest.raises(ConfigError, match="is out of range"):
            power(ALPHA, [0.1], **wrong)
    with pytest.raises(ConfigError, match=r"a risk of \[1\.5\] is out of range"):
        power(ALPHA, [1.5])
