"""`trilevel bench levels`: what each level is worth, on two generated tasks that a window alone cannot solve."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.bench.cells import Cell, Outcome, read_outcomes, train_cell
from trilevel.bench.harness import Bar, Progress, Report
from trilevel.data.synthetic import MajorityTask, RecallTask

VARIANTS = ("local", "local+regional", "local+global", "calibrated", "strict", "dense")
CACHE = Path("out/bench/levels/cells.jsonl")


def variant_levels(region_size: int) -> dict[str, Levels | None]:
    """The six variants: ratio 6:3:1 with the missing levels' heads given to the others in proportion; None is dense."""

    def with_ratio(*shares: int, **changes: Any) -> Levels:
        return Levels(ratio=LevelRatio(*shares), window=5, region_size=region_size, num_global_tokens=8, **changes)

    return {
        "local": with_ratio(1, 0, 0),
        "local+regional": with_ratio(6, 3, 0),
        "local+global": with_ratio(6, 0, 1),
        "calibrated": with_ratio(6, 3, 1),
        "strict": with_ratio(6, 3, 1, mode="strict"),
        "dense": None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelsCase:
    """What is trained: every variant on every task with every seed, in `workers` processes of one thread each.

    `region_size`, `steps` and `batch_size` go by task; `pool_rate` is explained in `Cell`.
    """

    recall: RecallTask = field(default_factory=lambda: RecallTask(num_keys=6))
    majority: MajorityTask = field(default_factory=MajorityTask)
    region_size: dict[str, int] = field(default_factory=lambda: {"recall": 8, "majority": 32})
    steps: dict[str, int] = field(default_factory=lambda: {"recall": 3_000, "majority": 300})
    batch_size: dict[str, int] = field(default_factory=lambda: {"recall": 32, "majority": 16})
    learning_rate: float = 4e-3
    pool_rate: float = 20.0
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = VARIANTS
    test_samples: int = 2_048
    workers: int = field(default_factory=torch.get_num_threads)
    cache: Path | None = CACHE
    bars: bool = True

    @staticmethod
    def smoke() -> LevelsCase:
        """Two steps of every variant in this process, no bars, nothing kept."""
        return LevelsCase(
            steps={"recall": 2, "majority": 2}, seeds=(0,), test_samples=32, workers=0, cache=None, bars=False
        )

    def cells(self) -> list[Cell]:
        """Every training run, seed by seed, so that an interrupted bench has whole comparisons."""
        tasks: dict[str, RecallTask | MajorityTask] = {"recall": self.recall, "majority": self.majority}
        return [
            self._cell(name, task, variant, seed)
            for seed in self.seeds
            for name, task in tasks.items()
            for variant in self.variants
        ]

    def _cell(self, name: str, task: RecallTask | MajorityTask, variant: str, seed: int) -> Cell:
        return Cell(
            name=name,
            task=task,
            variant=variant,
            seed=seed,
            levels=variant_levels(self.region_size[name])[variant],
            steps=self.steps[name],
            batch_size=self.batch_size[name],
            learning_rate=self.learning_rate,
            pool_rate=self.pool_rate,
            test_samples=self.test_samples,
        )


def run(case: LevelsCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Train what the cache does not hold yet and compare the variants.

    Finished runs are appended to `case.cache`, so an interrupted bench goes on where it stopped.
    """
    cells = case.cells()
    known = read_outcomes(case.cache) if case.cache is not None else {}
    outcomes = [known[cell.key] for cell in cells if cell.key in known]
    missing = [cell for cell in cells if cell.key not in known]
    for outcome in _train(missing, case):
        outcomes.append(outcome)
        if case.cache is not None:
            outcome.append_to(case.cache)
        what = f"{outcome.task}, {outcome.variant}, seed {outcome.seed}: {outcome.accuracy:.3f}"
        progress(what, len(outcomes) / len(cells))
    rows = summarise(outcomes)
    return Report(
        case="levels",
        rows=rows,
        bars=bars(rows) if case.bars else [],
        settings={
            "steps": case.steps, "batch_size": case.batch_size, "learning_rate": case.learning_rate,
            "seeds": list(case.seeds), "layers": 2, "dim": 80, "heads": 10, "window": 5, "num_global_tokens": 8,
            "region_size": case.region_size, "pool_rate": case.pool_rate, "test_samples": case.test_samples,
        },
    )  # fmt: skip


def _train(cells: list[Cell], case: LevelsCase) -> Iterable[Outcome]:
    if case.workers < 1:
        yield from (train_cell(cell) for cell in cells)
        return
    with ProcessPoolExecutor(case.workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train_cell, cell) for cell in cells]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            # after Ctrl-C what has not started is given up; what has finished is in the cache
            pool.shutdown(wait=True, cancel_futures=True)


def summarise(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One row for each task and variant: accuracy in per cent over the seeds, in the order of `VARIANTS`."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.task, outcome.variant), []).append(outcome)
    order = sorted(groups, key=lambda key: (key[0] != "recall", VARIANTS.index(key[1])))
    return [_summary(task, variant, groups[task, variant]) for task, variant in order]


def _summary(task: str, variant: str, outcomes: list[Outcome]) -> dict[str, Any]:
    accuracies = [100 * outcome.accuracy for outcome in sorted(outcomes, key=lambda outcome: outcome.seed)]
    return {
        "task": task,
        "variant": variant,
        "accuracy_percent": statistics.fmean(accuracies),
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "steps": round(statistics.fmean(outcome.steps for outcome in outcomes)),
        "by_seed": accuracies,
    }


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The bars of issue 2 in points: calibrated within 1 of dense, local at least 10 below it, on both tasks."""
    accuracy = {(row["task"], row["variant"]): row["accuracy_percent"] for row in rows}

    def difference(task: str, left: str, right: str) -> float | None:
        pair = accuracy.get((task, left)), accuracy.get((task, right))
        return None if pair[0] is None or pair[1] is None else pair[0] - pair[1]

    made = []
    for task in ("recall", "majority"):
        made.append(
            Bar(name=f"{task}_calibrated_vs_dense", value=difference(task, "calibrated", "dense"), op=">=", bar=-1)
        )
        made.append(Bar(name=f"{task}_local_below_dense", value=difference(task, "dense", "local"), op=">=", bar=10))
    return made
