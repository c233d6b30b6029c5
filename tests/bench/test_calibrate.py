"""`bench calibrate`: the fit finds rates that are known, and the report says how far it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trilevel.attention import calibration, library
from trilevel.attention.calibration import Work
from trilevel.attention.levels import Levels
from trilevel.bench import calibrate
from trilevel.bench.attention import gate_of
from trilevel.bench.calibrate import CalibrateCase, Place, Point, bars, digest, fit, judged, run, variants
from trilevel.bench.contenders import Contender, own_variants
from trilevel.bench.harness import Gate
from trilevel.bench.nnls import fit_relative, nnls
from trilevel.bench.problem import Problem

LEVELS = CalibrateCase().levels
RATES = {
    "native": Work(11e3, 900e3, 0.0, 0.13, 0.5, 1.3, 0.7, 0.01, 0.5, 1.9),
    "blocked": Work(700e3, 400e3, 90e3, 0.3, 0.4, 2.3, 13.0, 0.02, 6.1, 1.7),
}


def grid(impl: str, precision: str = "float32") -> list[Point]:
    assert impl in ("native", "blocked")
    return [
        Point(
            impl="native" if impl == "native" else "blocked",
            levels=levels,
            place=Place(variant=name, precision=precision, heads=heads, dim=dim, tokens=tokens),
        )
        for name, levels in variants(LEVELS).items()
        for heads, dim in CalibrateCase().shapes
        for tokens in CalibrateCase().lengths
    ]


def milliseconds(impl: str) -> dict[Point, float]:
    return {
        point: 1e-6 * sum(rate * amount for rate, amount in zip(RATES[impl], point.work, strict=True))
        for point in grid(impl)
    }


# definition


@given(st.integers(0, 2**32 - 1))
def test_nnls_is_the_best_of_all_active_sets(seed: int) -> None:
    draw = np.random.default_rng(seed)
    matrix, target = draw.standard_normal((7, 3)), draw.standard_normal(7)
    found = nnls(matrix, target)
    assert (found >= 0).all()
    best = float("inf")
    for chosen in range(8):
        columns = [column for column in range(3) if chosen >> column & 1]
        x = np.zeros(3)
        x[columns] = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
        if (x >= 0).all():
            best = min(best, float(np.linalg.norm(matrix @ x - target)))
    assert np.linalg.norm(matrix @ found - target) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_the_worst_error_counts_and_it_is_relative() -> None:
    # one rate for a point of a microsecond and one of a second that disagree: half way in relative terms
    found = fit_relative(np.array([[1.0], [1e6]]), np.array([1.0, 2e6]))
    errors = found[0] * np.array([1.0, 0.5]) - 1
    assert np.abs(errors).max() == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("impl", ["native", "blocked"])
def test_known_rates_are_found_again(impl: str) -> None:
    measured = milliseconds(impl)
    fitted = fit(measured)
    for point, ms in measured.items():
        assert fitted.predicted_ms(point.key, point.work) == pytest.approx(ms, rel=1e-6)
    rates = fitted.rates[impl, "float32"]
    # windows and features are the same at every place of the grid, so some kinds can stand for each other
    assert rates.fresh == pytest.approx(RATES[impl].fresh, rel=1e-3)
    assert rates.classes == pytest.approx(RATES[impl].classes, rel=1e-3)
    assert fitted.machine == calibration.this_machine()


def test_noise_of_a_tenth_is_not_made_larger() -> None:
    draw = np.random.default_rng(3)
    measured = {point: ms * draw.uniform(0.9, 1.1) for point, ms in milliseconds("blocked").items()}
    fitted = fit(measured)
    for point, ms in measured.items():
        assert fitted.predicted_ms(point.key, point.work) == pytest.approx(ms, rel=0.12)


def test_the_variants_are_those_of_the_other_bench() -> None:
    assert list(variants(LEVELS)) == list(own_variants(LEVELS))


def test_bars_are_the_worst_of_the_grid() -> None:
    measured = milliseconds("native") | milliseconds("blocked")
    fitted = fit(measured)
    # the clock then says something else at one place: a third slower than predicted, and three times the other's time
    slow = next(point for point in measured if point.impl == "native" and point.place.variant == "local")
    other = next(point for point in measured if point.impl == "blocked" and point.place == slow.place)
    measured |= {slow: 1.5 * measured[slow], other: 0.5 * measured[slow]}
    found = {point: {"status": "measured", "measured_ms": ms} for point, ms in measured.items()}
    rows = judged(fitted, found)
    error, loss = bars(rows)
    assert (error.name, error.op, error.bar, loss.name, loss.op, loss.bar) == (
        "cost_model_error", "<=", 0.2, "auto_vs_best", "<=", 1.1,
    )  # fmt: skip
    worst = max(abs(row["relative_error"]) for row in rows)
    assert error.value == worst > 1 / 3 - 1e-6
    assert loss.value == pytest.approx(3)
    assert sum("auto_over_best" in row for row in rows) == len(rows) / 2


def test_the_digest_has_a_row_for_each_implementation_and_precision() -> None:
    point = {"impl": "native", "precision": "float32"}
    rows: list[dict[str, Any]] = [
        {**point, "measured_ms": 2.0, "predicted_ms": 2.2, "relative_error": 0.1},
        {**point, "measured_ms": 5.0, "predicted_ms": 3.5, "relative_error": -0.3},
        {**point, "measured_ms": 7.0, "predicted_ms": 7.0, "relative_error": 0.0},
        {**point, "precision": "bfloat16", "status": "absent"},
    ]
    first, second = digest(rows)
    assert first == {
        "implementation": "native", "precision": "float32", "points": 3, "fastest_ms": 2.0, "slowest_ms": 7.0,
        "median_error": 0.1, "largest_error": 0.3,
    }  # fmt: skip
    assert (second["precision"], second["points"], second["largest_error"]) == ("bfloat16", 0, None)


def test_nothing_measured_holds_no_bar() -> None:
    assert [(bar.value, bar.holds) for bar in bars([])] == [(None, False)] * 2


# the whole case


def tiny(keeps: bool) -> CalibrateCase:
    levels = Levels(window=5, region_size=None, num_regions=7, num_global_tokens=3)
    return CalibrateCase(
        lengths={31: 0.0, 61: 0.0}, shapes=((3, 16),), precisions=("float32",), levels=levels, keeps=keeps
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(calibration, "folder", lambda: tmp_path)
    calibration.forget()
    return tmp_path


def test_a_run_stores_what_it_fitted(place: Path) -> None:
    report = run(tiny(keeps=True))
    assert [bar.name for bar in report.bars] == ["cost_model_error", "auto_vs_best"]
    assert {row["status"] for row in report.measurements} <= {"measured", "absent"}
    impls = {row["impl"] for row in report.measurements if row["status"] == "measured"}
    assert impls == {"native", "blocked", "dense"} if library.is_available() else {"blocked", "dense"}
    stored = calibration.current()
    assert stored is not None
    assert stored.to_dict() == report.settings["calibration"]
    assert list(place.iterdir()) == [calibration.path_of(calibration.this_machine())]
    for row in report.measurements:
        if row["status"] == "measured":
            assert row["relative_error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)


def test_smoke_stores_nothing_and_has_no_bars(place: Path) -> None:
    report = run(tiny(keeps=False))
    assert report.bars == []
    assert report.holds
    assert list(place.iterdir()) == []
    assert not CalibrateCase.smoke().keeps


def test_a_wrong_answer_is_not_timed_and_nothing_is_stored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gate(contender: Contender, problem: Problem, output: torch.Tensor) -> Gate:
        if contender.name == "trilevel blocked strict":
            return Gate(error=0.5, limit=0.1)
        return gate_of(contender, problem, output)

    monkeypatch.setattr(calibrate, "gate_of", gate)
    report = run(tiny(keeps=True))
    assert report.broken == ["trilevel blocked strict"]
    assert not report.holds
    failed = [row for row in report.measurements if row["status"] == "failed"]
    assert {(row["impl"], row["variant"]) for row in failed} == {("blocked", "strict")}
    assert all("measured_ms" not in row for row in failed)
    assert list(place.iterdir()) == []


def test_without_native_kernels_the_others_are_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = library.NativeStatus(None, (), "not built for this test")
    monkeypatch.setattr(library, "status", lambda: missing)
    report = run(tiny(keeps=True))
    absent = [row for row in report.measurements if row["status"] == "absent"]
    assert {row["impl"] for row in absent} == {"native"}
    assert {row["reason"] for row in absent} == {"not built for this test"}
    # nothing to choose from
    assert report.bars[1].value is None
    assert list(place.iterdir()) == [calibration.path_of(calibration.this_machine())]
