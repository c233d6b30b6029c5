"""The levels case: variants, cache, summary and bars; two steps of every variant run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trilevel.bench import levels as module
from trilevel.bench.cells import Cell, Outcome, read_outcomes, train_cell
from trilevel.bench.harness import Report
from trilevel.bench.levels import VARIANTS, LevelsCase, bars, run, summarise, variant_levels
from trilevel.bench.levels_docs import write_docs
from trilevel.data.synthetic import MajorityTask
from trilevel.errors import InputError


def small() -> LevelsCase:
    task = MajorityTask(num_tokens=26, num_regions=2, num_symbols=3, lead=6)
    return dataclasses.replace(LevelsCase.smoke(), majority=task, batch_size={"recall": 3, "majority": 3})


def outcome(task: str, variant: str, seed: int, accuracy: float) -> Outcome:
    return Outcome(key=f"{task}{variant}{seed}", task=task, variant=variant, seed=seed, accuracy=accuracy, steps=5)


def test_variants_leave_out_what_their_name_says() -> None:
    made = variant_levels(16)
    assert tuple(made) == VARIANTS
    splits = {name: levels.ratio.split(10) for name, levels in made.items() if levels is not None}
    assert splits["local"] == (10, 0, 0)
    assert splits["local+regional"][2] == 0
    assert splits["local+global"][1] == 0
    assert all(splits["calibrated"])
    assert splits["strict"] == splits["calibrated"]
    assert made["strict"] is not None
    assert made["strict"].mode == "strict"
    assert made["dense"] is None


def test_every_variant_runs_on_both_tasks() -> None:
    seen: list[float] = []
    report = run(small(), lambda _what, done: seen.append(done))
    assert {(row["task"], row["variant"]) for row in report.rows} == {
        (task, variant) for task in ("recall", "majority") for variant in VARIANTS
    }
    assert all(0 <= row["accuracy_percent"] <= 100 for row in report.rows)
    assert seen[-1] == 1
    assert report.holds


def test_finished_cells_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Cell] = []

    def train(cell: Cell) -> Outcome:
        trained.append(cell)
        return Outcome(
            key=cell.key, task=cell.name, variant=cell.variant, seed=cell.seed, accuracy=0.5, steps=cell.steps
        )

    monkeypatch.setattr(module, "train_cell", train)
    case = dataclasses.replace(small(), cache=tmp_path / "cells.jsonl", variants=("local", "dense"))
    run(dataclasses.replace(case, variants=("local",)))
    assert len(trained) == 2
    report = run(case)
    assert [cell.variant for cell in trained] == ["local", "local", "dense", "dense"]
    assert [row["variant"] for row in report.rows] == ["local", "dense"] * 2
    run(dataclasses.replace(case, learning_rate=1e-3))
    assert len(trained) == 8


def test_a_cut_last_line_is_passed_over_and_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    outcome("recall", "dense", 0, 1.0).append_to(path)
    outcome("recall", "dense", 1, 0.5).append_to(path)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-20], encoding="utf-8")
    assert [found.seed for found in read_outcomes(path).values()] == [0]
    path.write_text("{}\n" + whole, encoding="utf-8")
    with pytest.raises(InputError, match="Delete the file"):
        read_outcomes(path)
    assert read_outcomes(tmp_path / "absent.jsonl") == {}


def test_a_run_is_a_function_of_its_cell_and_stops_when_perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = small().cells()[-1]
    assert train_cell(cell) == train_cell(cell)
    monkeypatch.setattr("trilevel.bench.cells._accuracy", lambda *_: 1.0)
    monkeypatch.setattr("trilevel.bench.cells.EVALUATE_EVERY", 1)
    assert train_cell(dataclasses.replace(cell, steps=9)).steps == 3


def test_summary_and_bars() -> None:
    outcomes = [
        *(outcome("recall", "dense", seed, value) for seed, value in enumerate((1.0, 1.0, 0.99))),
        outcome("recall", "calibrated", 0, 0.98),
        outcome("recall", "local", 0, 0.3),
        outcome("majority", "dense", 0, 0.9),
        outcome("majority", "calibrated", 0, 0.95),
    ]
    rows = summarise(outcomes)
    assert [row["variant"] for row in rows] == ["local", "calibrated", "dense", "calibrated", "dense"]
    assert rows[2]["by_seed"] == [100, 100, 99]
    made = {bar.name: bar for bar in bars(rows)}
    assert made["recall_calibrated_vs_dense"].value == pytest.approx(98 - 299 / 3)
    assert not made["recall_calibrated_vs_dense"].holds
    assert made["recall_local_below_dense"].holds
    assert made["majority_calibrated_vs_dense"].value == pytest.approx(5)
    assert made["majority_local_below_dense"].value is None


def test_page_and_picture_are_written(tmp_path: Path) -> None:
    rows = summarise([outcome(task, variant, 0, 0.5) for task in ("recall", "majority") for variant in VARIANTS])
    report = Report(case="levels", rows=rows, bars=bars(rows), settings=run(small()).settings)
    write_docs(report, tmp_path)
    page = (tmp_path / "levels.md").read_text(encoding="utf-8")
    assert "| local+regional | 50.0 (50.0-50.0) | 5 | 50.0 (50.0-50.0) | 5 |" in page
    assert "`recall_local_below_dense` | 0.00 | >= 10 | no" in page
    assert (tmp_path / "img" / "levels.png").stat().st_size > 1_000
