"""Evaluation: every system on the same documents, bars named as the issue names them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trilevel.applications.documents import evaluate as evaluation
from trilevel.applications.documents.checkpoint import save_run
from trilevel.applications.documents.evaluate import Case, Outcome
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.data.documents import Document
from trilevel.errors import CheckpointError

BARS = ["rouge1_vs_dense", "rouge2_vs_dense", "rougeL_vs_dense"]
BARS += ["rouge1_vs_lead", "rouge1_vs_lexrank", "rouge1_vs_textrank"]
BARS += ["minilm_rouge1_vs_scratch", "minilm_rouge1_vs_centroid"]


@pytest.fixture
def cases(tmp_path: Path, document: Document) -> list[Case]:
    path = tmp_path / "d.jsonl"
    rows = [
        {"id": str(i), "title": document.title, "text": document.text, "abstract": document.abstract} for i in range(3)
    ]
    path.write_text("\n".join(json.dumps({**row, "split": "test"}) for row in rows))
    return evaluation.prepare(path)


def test_every_system_on_the_same_documents(
    cases: list[Case], tmp_path: Path, model: DocumentModel, tokenizer: DocumentTokenizer
) -> None:
    save_run(tmp_path / "ours", model, tokenizer)
    save_run(tmp_path / "dense", model.dense(), tokenizer)
    runs = {"trilevel": tmp_path / "ours", "dense": tmp_path / "dense", "trilevel+focus": tmp_path / "ours"}
    seen: list[tuple[str, int]] = []
    outcomes = evaluation.evaluate(
        cases, evaluation.systems(runs, budget_words=23), on_progress=lambda name, done: seen.append((name, done))
    )
    assert list(outcomes) == ["trilevel", "dense", "trilevel+focus", "lead", "random", "lexrank", "textrank", "oracle"]
    assert seen[:3] == [("trilevel", 1), ("trilevel", 2), ("trilevel", 3)]
    for name, outcome in outcomes.items():
        assert outcome.scores.shape == (3, 3)
        if name != "oracle":
            assert (outcome.words <= 23).all()
    assert outcomes["oracle"].scores[:, 0].min() >= max(o.scores[:, 0].max() for o in outcomes.values()) - 1e-9
    result = evaluation.report(outcomes)
    assert json.loads(json.dumps(result)) == result
    assert [bar["name"] for bar in result["bars"]] == BARS
    assert {"machine", "rows", "bars"} <= set(result)
    assert evaluation.report(outcomes, with_bars=False)["bars"] == []


def outcome(value: float) -> Outcome:
    scores = np.random.default_rng(0).uniform(0.5, 1.5, (37, 3)) * value
    return Outcome(scores=scores, words=np.full(37, 50), chosen=[[1]] * 37)


@pytest.mark.parametrize(("ours", "holds"), [(10.0, True), (9.91, True), (9.89, False)])
def test_bars_against_dense(ours: float, holds: bool) -> None:
    low = {name: outcome(5.0) for name in ("lead", "lexrank", "textrank")}
    bars = evaluation.report({"trilevel": outcome(ours), "dense": outcome(10.0), **low})["bars"]
    assert [bar["holds"] for bar in bars][:6] == [holds] * 3 + [True] * 3
    assert bars[0]["value"] == pytest.approx(ours / 10)


def test_equal_to_a_baseline_is_not_above_it() -> None:
    outcomes = {name: outcome(5.0) for name in ("trilevel", "dense", "lead", "lexrank", "textrank")}
    assert [bar["holds"] for bar in evaluation.report(outcomes)["bars"]][:6] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(("scratch", "centroid", "holds"), [(4.9, 4.8, [True, True]), (5.0, 5.1, [False, False])])
def test_the_bars_of_the_model_on_minilm_are_its_own(scratch: float, centroid: float, holds: list[bool]) -> None:
    outcomes = {"trilevel": outcome(9.0), "minilm": outcome(5.0)}
    result = evaluation.report({**outcomes, "shipped": outcome(scratch), "centroid": outcome(centroid)})
    assert [bar["holds"] for bar in result["bars"]][6:] == holds
    assert result["bars"][6]["value"] == pytest.approx(5.0 / scratch, abs=1e-4)
    assert {row["over"] for row in result["ratios"] if row["system"] == "minilm"} == {"trilevel", "shipped", "centroid"}


def test_a_system_that_was_not_run_fails_its_bars() -> None:
    bars = evaluation.report({"trilevel": outcome(5.0), "lead": outcome(1.0)})["bars"]
    assert [bar["holds"] for bar in bars] == [False, False, False, True] + [False] * 4
    assert bars[0]["value"] is None


def test_agreement() -> None:
    assert evaluation.agreement([[1, 2], []], [[2, 3], []]) == pytest.approx((1 / 3 + 1) / 2)


def test_no_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluation, "KEPT_RUNS", tmp_path)
    with pytest.raises(CheckpointError, match="no model to evaluate"):
        evaluation.runs()


def test_the_real_documents_give_the_known_lead(tech_path: Path) -> None:
    cases = evaluation.prepare(tech_path, split="test", limit=11)
    assert all(case.encoded.oracle.any() for case in cases)
    ways = evaluation.systems({}, budget_words=59)
    scores = evaluation.evaluate(cases, {name: ways[name] for name in ("lead", "oracle")})
    assert 15 < scores["lead"].scores[:, 0].mean() < 45
    assert scores["oracle"].scores[:, 0].mean() > scores["lead"].scores[:, 0].mean()


def test_case_gives_texts(cases: list[Case]) -> None:
    assert cases[0].sentences([0]) == ["Levels of attention"]
    assert replace(cases[0]).units == cases[0].units


def test_ratios_have_intervals_around_them() -> None:
    outcomes = {name: outcome(value) for name, value in (("trilevel", 6.0), ("dense", 5.0))}
    noisy = Outcome(scores=np.random.default_rng(1).uniform(3, 9, (37, 3)), words=np.full(37, 5), chosen=[[1]] * 37)
    ratios = evaluation.report({**outcomes, "lead": noisy})["ratios"]
    assert [ratio["over"] for ratio in ratios] == ["dense", "lead"]
    assert ratios[0]["rouge1"] == pytest.approx(1.2)
    low, high = ratios[1]["rouge2_interval"]
    assert low < ratios[1]["rouge2"] < high
