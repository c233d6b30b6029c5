"""`trilevel bench paths`: routed artifacts against the best fixed path with the same proof, and what certificates hold.

An artifact's paths are run on held-out samples that chose nothing, by its own executor, at several batch sizes: the
full path, the cheapest fixed path that was proved, and paths of their own. What samples get in a batch is compared with
what they get alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from trilevel.applications.route import load_samples, promised_labels
from trilevel.applications.route_outcomes import Machine, collect, sample_ms
from trilevel.artifact.audited import watched
from trilevel.artifact.manifest import ROUTING_FILE, Artifact, read_artifact
from trilevel.artifact.routed import RoutedPredictor, read_latency
from trilevel.artifact.runtime.predictor import Runtime
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.bench.chain import chain_8k, chain_bars, summarize_10k
from trilevel.bench.drift import drift
from trilevel.bench.harness import Bar, Progress, Report, interleave
from trilevel.compression.written import read_json
from trilevel.data.places import data_path
from trilevel.errors import CertificateError, InputError, require
from trilevel.routing.certify import certify
from trilevel.routing.decision import Promise, answers, fixed_settings
from trilevel.routing.evidence import binomial_p_value
from trilevel.routing.executor import Routed, execute
from trilevel.routing.latency import measure
from trilevel.routing.outcomes import Outcomes
from trilevel.routing.paths import PathSet
from trilevel.routing.router import Rule, settings
from trilevel.routing.samples import Samples
from trilevel.routing.targets import Target, parse_target

if TYPE_CHECKING:
    from rich.table import Table

Floats = npt.NDArray[np.floating[Any]]
FULL, FIXED, OURS, DEEPEST = "full path", "best fixed path", "paths of their own", "deepest cheap path"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsCase:
    """What is measured.

    Args:
        tasks: artifact and data of each task.
        runtime: what runs the paths.
        batches: most samples at once.
        samples: that are timed.
        limit: test samples that are run; None for all.
        draws: calibration sets for the validity of certificates.
        budget_s: of each task's timing at each batch size.
        work: folder where answers are kept between runs; None for the artifact's folder with `.bench` behind its name.
        long_documents: joined to 8,192 tokens, for the chain of a summariser; 0 leaves out that and the 10,000 words.
        has_bars: whether speed is judged; else only that answers are right.
    """

    tasks: Sequence[tuple[Path, Path]]
    runtime: Runtime = "onnxruntime"
    batches: tuple[int, ...] = (1, 8, 32)
    samples: int = 256
    limit: int | None = None
    draws: int = 2_000
    budget_s: float = 60.0
    work: Path | None = None
    long_documents: int = 6
    has_bars: bool = True


def run(case: PathsCase, progress: Progress) -> Report:
    """Measure every task.

    Raises:
        InputError: the data cannot be used, or an artifact has no certificate here.
        ArtifactError: an artifact is damaged or has one path.
    """
    tasks = [_Task.open(case, Path(folder), data) for folder, data in case.tasks]
    found = [task.measured(case, progress) for task in tasks]
    chain = summary = None
    if case.long_documents:
        for task in (task for task in tasks if task.samples.task == "documents"):
            chain = chain_8k(
                task.artifact,
                task.predictor,
                task.data,
                documents=case.long_documents,
                budget_s=case.budget_s / 4,
                work=task.work,
                tell=lambda what: progress(what, 0.0),
            )
        summary = summarize_10k(torch.get_num_threads(), lambda what: progress(what, 0.0))
    return Report(
        case="paths",
        rows=[row for task in found for row in task["rows"]],
        bars=[*_bars(found), *(chain_bars(chain, summary) if case.long_documents else [])] if case.has_bars else [],
        settings={
            "runtime": case.runtime,
            "threads": torch.get_num_threads(),
            "batches": list(case.batches),
            "chain_8k": chain,
            "summarize_10k": summary,
        },
        measurements=[{name: value for name, value in task.items() if name != "rows"} for task in found],
        broken=[task["task"] for task in found if not task["same_alone"]],
    )


def _bars(found: Sequence[Mapping[str, Any]]) -> list[Bar]:
    below = sum(task["vs_fixed"] <= 0.75 for task in found)
    return [
        Bar(name="tasks_below_static_frontier", value=float(below), op=">=", bar=2),
        Bar(name="latency_vs_full_fp32", value=fmean(t["vs_full"] for t in found), op="<=", bar=0.30),
        Bar(name="latency_vs_full_best", value=fmean(t["vs_full_best"] for t in found), op="<=", bar=0.60),
        Bar(name="certificate_violations", value=max(t["violations_lower"] for t in found), op="<=", bar=0.05),
        Bar(name="latency_prediction_error", value=max(t["prediction_error"] for t in found), op="<=", bar=0.10),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    artifact: Artifact
    predictor: RoutedPredictor
    samples: Samples
    data: Path
    report: Mapping[str, Any]
    target: Target
    work: Path

    @staticmethod
    def open(case: PathsCase, folder: Path, data: Path) -> _Task:
        artifact = read_artifact(folder)
        predictor = RoutedPredictor(artifact, case.runtime, threads=torch.get_num_threads())
        if predictor.rule is None:
            raise InputError(f"{folder}: {predictor.reason}.")
        report = read_json(artifact.file(ROUTING_FILE))
        return _Task(
            artifact=artifact,
            predictor=predictor,
            samples=load_samples(artifact, data, split="test", limit=case.limit),
            data=data_path(data),
            report=report,
            target=parse_target(report["targets"][0]),
            work=case.work or folder.with_name(f"{folder.name}.bench"),
        )

    def measured(self, case: PathsCase, progress: Progress) -> dict[str, Any]:
        name = self.artifact.manifest.name
        rng = np.random.default_rng(0)
        # of documents a tenth: each is as long as dozens of sentences
        count = case.samples if self.samples.judge is None else max(8, case.samples // 10)
        some = self.samples.some(rng.permutation(len(self.samples))[:count].tolist())
        rows = [self._timed(some, batch, case.budget_s, partial(progress, f"{name}, batch")) for batch in case.batches]
        machine = Machine(runtime=case.runtime, threads=torch.get_num_threads())
        steps = machine.open(self.artifact)
        outcomes = collect(
            self.artifact, machine, self.samples, steps, self.work / "test.npz", progress=progress, what=name
        )
        table = read_latency(self.artifact)
        again = {
            is_whole: measure(
                steps, some.example, batches=table.batches, lengths=table.lengths, machine={}, is_whole=is_whole,
                router=self.predictor.features, budget_s=case.budget_s / 2, progress=progress,
            )
            for is_whole in (False, True)
        }  # fmt: skip
        return {
            "task": self.artifact.manifest.task,
            "name": name,
            "rows": rows,
            "same_alone": self._is_same_alone(some),
            "loss": self._loss(outcomes),
            "vs_full": fmean(row["vs_full"] for row in rows),
            "vs_full_best": fmean(row["vs_full_best"] for row in rows),
            "vs_fixed": fmean(row["vs_fixed"] for row in rows),
            "prediction_error": again[False].error(again[True]),
            "drift": self._drift(machine, steps, progress),
            **self._validity(outcomes, case.draws),
        }

    def _drift(
        self, machine: Machine, steps: Mapping[str, SegmentSteps], progress: Progress
    ) -> list[dict[str, Any]] | None:
        """Of images; what noise is to texts nobody knows."""
        certificate, rule = self.predictor.certificate, self.predictor.rule
        if self.samples.task != "images" or certificate is None or rule is None:
            return None

        def run(samples: Samples, name: str) -> Outcomes:
            kept = self.work / f"{name}.npz"
            return collect(self.artifact, machine, samples, steps, kept, progress=progress, what=name)

        return drift(self.samples, run, rule.router, rule.setting, watched(certificate))

    def _fixed(self) -> tuple[str, Mapping[str, float]]:
        """The cheapest fixed path that was proved, by the artifact's own report."""
        proved = [row for row in self.report["rows"] if row["kind"] == "fixed" and row["is_proved"]]
        first = next(iter(proved[0]["ms"]))
        name = min(proved, key=lambda row: row["ms"][first])["name"]
        return name, self._fixed_settings()[name]

    def _static(self, batch: int) -> tuple[str, float] | None:
        """The cheapest other model that was proved, and its time over the full path's, by the artifact's own report."""
        proved = [row for row in self.report["rows"] if row["kind"] == "static" and row["is_proved"]]
        (full,) = (row for row in self.report["rows"] if row["name"] == self.predictor.router.full)
        # documents are timed at few batch sizes
        size = str(batch) if str(batch) in full["ms"] else max(full["ms"], key=int)
        found = min(proved, key=lambda row: row["ms"][size], default=None)
        return None if found is None else (found["name"], found["ms"][size] / full["ms"][size])

    def _fixed_settings(self) -> dict[str, dict[str, float]]:
        # their order, which times decide, does not matter here
        return dict(fixed_settings(self.predictor.router, dict.fromkeys(self.predictor.paths.names, 1.0)))

    def _execute(self, samples: Samples, setting: Mapping[str, float] | None, batch: int) -> list[Routed]:
        own = self.predictor
        full = own.paths.full
        rule = None if setting is None else Rule(router=own.router, setting=setting)
        features = None
        if rule is not None:
            lengths = samples.lengths
            features = np.concatenate(
                [own.features(samples.collate([row], int(n))) for row, n in zip(samples.rows, lengths, strict=True)]
            )
        return execute(
            samples.rows,
            own.steps,
            PathSet(paths=(full,), full=full) if rule is None else own.paths,
            rule,
            max_batch=batch,
            length_of=samples.length_of,
            collate=samples.collate,
            features=features,
        )

    def _timed(
        self, samples: Samples, batch: int, budget_s: float, progress: Callable[[float], None]
    ) -> dict[str, Any]:
        assert self.predictor.rule is not None
        name, fixed = self._fixed()
        ours = self.predictor.rule.setting
        deepest = self._fixed_settings()
        last = self.predictor.router.families[-1]
        # the full path is its own best where the cheap paths are the beginnings of it
        best = last.paths[-1] if self.predictor.router.restarts(last) else self.predictor.router.full
        runs: dict[str, Callable[[], object]] = {
            FULL: lambda: self._execute(samples, None, batch),
            OURS: lambda: self._execute(samples, ours, batch),
        }
        if best != self.predictor.router.full:
            runs[DEEPEST] = lambda: self._execute(samples, deepest[best], batch)
        if name != self.predictor.router.full:
            runs[FIXED] = lambda: self._execute(samples, fixed, batch)
        progress(0.0)
        timings = interleave(runs, budget_s=budget_s, min_repeats=3, max_repeats=30)
        ms = {one: timing.median_ms / len(samples) for one, timing in timings.items()}
        ms = {FIXED: ms[FULL], DEEPEST: ms[FULL]} | ms
        static = self._static(batch)
        if static is not None and static[1] * ms[FULL] < ms[FIXED]:
            name, ms[FIXED] = static[0], static[1] * ms[FULL]
        return {
            "task": self.artifact.manifest.name,
            "batch": batch,
            "samples": len(samples),
            **{f"{one} ms": value for one, value in ms.items()},
            "fixed path": name,
            "vs_full": ms[OURS] / ms[FULL],
            "vs_full_best": ms[OURS] / min(ms[FULL], ms[DEEPEST]),
            "vs_fixed": ms[OURS] / ms[FIXED],
            "repeats": len(timings[OURS].seconds),
        }

    def _is_same_alone(self, samples: Samples) -> bool:
        """Whether samples get the same path and class in a batch as alone."""
        assert self.predictor.rule is not None
        few = samples.some(range(min(64, len(samples))))
        together, alone = (self._execute(few, self.predictor.rule.setting, batch) for batch in (32, 1))
        return all(
            one.path == other.path and one.output.argmax() == other.output.argmax()
            for one, other in zip(together, alone, strict=True)
        )

    def _promise(self) -> Promise:
        delta = 1 - float(self.report["confidence"])
        return Promise(targets=[self.target], delta=delta, labels=promised_labels(self.artifact))

    def _loss(self, outcomes: Outcomes) -> float:
        assert self.predictor.rule is not None
        found = answers(outcomes, self.predictor.router, [self.predictor.rule.setting])
        matrix, counts = self._promise().losses(outcomes, found)[0]
        return self.target.shown(float(matrix[counts, 0].mean()))

    def _validity(self, outcomes: Outcomes, draws: int) -> dict[str, Any]:
        """How often a certificate, and a plain search, picks a setting whose true loss is too high.

        The samples are the population, so the true loss is known; calibration sets are drawn from it with replacement,
        whole groups.
        """
        table = read_latency(self.artifact)
        ms = {path: float(np.mean(own)) for path, own in sample_ms(table, outcomes, table.batches[0]).items()}
        half = outcomes.rows(slice(0, len(outcomes) // 4))
        chain = settings(half, self.predictor.router, ms)
        promise = self._promise()
        losses, counts = promise.losses(outcomes, answers(outcomes, self.predictor.router, chain))[0]
        return validity(
            losses[counts], self.target, promise.delta, draws=draws, size=int(self.report["samples"]["prove"])
        )


def validity(losses: Floats, target: Target, delta: float, *, draws: int, size: int) -> dict[str, Any]:
    """Shares of calibration sets, drawn with replacement, that pick a setting whose loss in the population is too high.

    Args:
        losses: (groups, settings), the population, settings from safe to cheap.
        target: what is promised.
        delta: the chance of being wrong that is allowed.
        draws: calibration sets.
        size: groups in each.
    """
    stats = require("scipy.stats", extra="routing")
    risks, rng = losses.mean(0), np.random.default_rng(0)
    broken = naive = refused = 0
    for _ in range(draws):
        drawn = losses[rng.integers(0, len(losses), size)]
        place = _last_proved(drawn, target, delta)
        refused += place is None
        broken += place is not None and risks[place] > target.bound
        fits = np.flatnonzero(drawn.mean(0) <= target.bound)
        naive += len(fits) > 0 and risks[fits[-1]] > target.bound
    lower = 0.0 if not broken else float(stats.beta.ppf(0.05, broken, draws - broken + 1))
    return {
        "draws": draws,
        "violations": broken / draws,
        "violations_lower": lower,
        "violations_plain_search": naive / draws,
        "refused": refused / draws,
    }


def _last_proved(drawn: Floats, target: Target, delta: float) -> int | None:
    """As `certify`, quickly where losses are 0 and 1."""
    if not target.is_plain:
        everyone = np.ones(len(drawn), bool)
        try:
            return certify([target], [(drawn, everyone)], delta=delta, groups=np.arange(len(drawn))).setting
        except CertificateError:
            return None
    found = None
    for place, errors in enumerate(drawn.sum(0).astype(int)):
        if binomial_p_value(int(errors), len(drawn), target.bound) > delta:
            break
        found = place
    return found


def parse_tasks(given: Sequence[str]) -> list[tuple[Path, Path]]:
    """Artifacts and their data from `ARTIFACT=DATA`.

    Raises:
        InputError: one has no `=`.
    """
    pairs = [text.partition("=") for text in given]
    if any(not (artifact and data) for artifact, _, data in pairs):
        raise InputError(
            f"--task {' --task '.join(given)}: write ARTIFACT=DATA, a folder of trilevel route and its data."
        )
    return [(Path(artifact), Path(data)) for artifact, _, data in pairs]


def paths_table(report: Report) -> Table:
    """Milliseconds of a sample, task by task and batch by batch."""
    from rich.table import Table

    table = Table(title="milliseconds of a sample, and ours over the others", title_justify="left")
    columns = (
        "task",
        "batch",
        f"{FULL} ms",
        f"{FIXED} ms",
        "fixed path",
        f"{OURS} ms",
        "vs_full",
        "vs_full_best",
        "vs_fixed",
    )
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("task", "fixed path") else "right")
    for row in report.rows:
        table.add_row(
            *(f"{row[column]:.3g}" if isinstance(row[column], float) else str(row[column]) for column in columns)
        )
    return table
