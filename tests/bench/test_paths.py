"""What `trilevel bench paths` works out: validity of certificates, what an audit finds, bars; its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.routing.samples import FAMILIES, MS, disagreement, make_outcomes
from trilevel.bench.chain import chain_bars
from trilevel.bench.drift import drift
from trilevel.bench.paths import _Task, parse_tasks, validity
from trilevel.errors import InputError
from trilevel.routing.decision import answers
from trilevel.routing.outcomes import Outcomes
from trilevel.routing.router import fit_router, settings
from trilevel.routing.samples import Samples
from trilevel.routing.targets import Target


def test_certificates_hold_where_a_plain_search_does_not() -> None:
    rng = np.random.default_rng(0)
    # settings from safe to cheap; the fourth loses a little more than is allowed
    risks = np.array([0.0, 0.004, 0.009, 0.011, 0.03])
    losses = (rng.random((20_000, 1)) < risks).astype(float)
    found = validity(losses, Target(kind="harm", alpha=0.01), 0.05, draws=300, size=2_000)
    assert found["violations"] <= 0.05
    assert found["violations_plain_search"] > 0.2
    assert found["violations_lower"] <= found["violations"]
    # losses of grades take the betting test
    graded = (1 + rng.normal(0.002, 0.01, (2_000, 2)).clip(-1, 1)) / 2
    found = validity(graded, Target(kind="drop", alpha=0.01), 0.05, draws=5, size=1_500)
    assert (found["violations"], found["refused"]) == (0.0, 0.0)


def test_noise_is_found_by_the_audit_where_answers_change() -> None:
    outcomes = make_outcomes(900, seed=3)
    router = fit_router(outcomes, disagreement(outcomes), FAMILIES, ("hint", "noise"))
    chain = settings(outcomes, router, MS)
    shares = (answers(outcomes, router, chain) != outcomes.full_predictions[:, None]).mean(0)
    setting = chain[np.flatnonzero(shares <= 0.15)[-1]]
    seen: list[tuple[str, np.ndarray]] = []

    def run(samples: Samples, name: str) -> Outcomes:
        seen.append((name, np.stack(list(samples.rows))))
        # noise makes every cheap answer another one
        others = (outcomes.full_predictions[:, None] + 1) % 3
        wrong = np.where(np.arange(4) < 3, others, outcomes.predictions)
        return outcomes if name == "noise-0" else replace(outcomes, predictions=wrong)

    rows = [np.full((1, 4, 4), 7, np.uint8)] * 900
    samples = Samples(
        task="images",
        rows=rows,
        digests=["d"] * 900,
        groups=np.arange(900),
        labels=outcomes.labels,
        length_of=lambda _row: 1,
        collate=lambda chosen, _length: {"pixels": np.stack(chosen)},
    )
    calm, noisy = drift(samples, run, router, setting, alpha=0.15, noises=(0, 40), count=900)
    assert [name for name, _ in seen] == ["noise-0", "noise-40"]
    assert (seen[0][1] == 7).all()
    assert 20 < seen[1][1].std() < 40
    assert calm["changed"] <= 0.15 < 0.5 < noisy["changed"]
    assert calm["alarmed"] <= 0.03
    assert noisy["alarmed"] >= 0.9
    assert noisy["full_path_accuracy"] == pytest.approx(float((outcomes.full_predictions == outcomes.labels).mean()))


@pytest.mark.parametrize(
    ("batch", "wanted"),
    # of sizes that were not timed the largest stands in
    [(1, ("small", 0.5)), (8, ("smaller", 0.25)), (32, ("smaller", 0.25))],
)
def test_the_static_frontier_has_other_models_that_were_proved(batch: int, wanted: tuple[str, float]) -> None:
    def row(name: str, kind: str, ms: tuple[float, float], is_proved: bool) -> dict[str, Any]:
        return {"name": name, "kind": kind, "ms": {"1": ms[0], "8": ms[1]}, "is_proved": is_proved}

    rows = [
        row("float32/1", "fixed", (10.0, 8.0), True),
        row("int8/1", "fixed", (1.0, 1.0), True),
        row("small", "static", (5.0, 4.0), True),
        row("smaller", "static", (6.0, 2.0), True),
        row("unproved", "static", (0.1, 0.1), False),
    ]
    predictor = SimpleNamespace(router=SimpleNamespace(full="float32/1"))
    assert _Task._static(_with(rows, predictor), batch) == wanted
    assert _Task._static(_with(rows[:2], predictor), batch) is None


def _with(rows: list[dict[str, Any]], predictor: object) -> Any:
    return SimpleNamespace(report={"rows": rows}, predictor=predictor)


def test_bars_of_chains() -> None:
    assert not any(bar.holds for bar in chain_bars(None, None))
    summary = {"seconds": {"int8": 0.5}, "peak_bytes": {"int8": 4e8}, "vs_dense": 11.0}
    bars = {bar.name: bar.holds for bar in chain_bars({"vs_torch_fp32": 41.0, "vs_openvino_int8": 19.0}, summary)}
    assert bars == {
        "chain_8k_vs_torch_fp32": True,
        "chain_8k_vs_openvino_int8": False,
        "summarize_10k_s": True,
        "summarize_10k_peak_bytes": True,
        "summarize_10k_vs_dense": True,
    }


def test_tasks_as_they_are_written() -> None:
    assert parse_tasks(["a=b.csv"]) == [(Path("a"), Path("b.csv"))]
    with pytest.raises(InputError, match="write ARTIFACT=DATA"):
        parse_tasks(["a"])
