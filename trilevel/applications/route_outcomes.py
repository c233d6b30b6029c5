"""What every path of an artifact answers and takes, on this machine; kept, so that it is found once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.artifact.check import precisions
from trilevel.artifact.manifest import FULL_FAMILY, TOKENIZER_FILE, Artifact, read_artifact
from trilevel.artifact.platform import has_bfloat16_products, isa_class
from trilevel.artifact.probe import Arrays
from trilevel.artifact.routed import model_hash
from trilevel.artifact.runtime.predictor import Precision, Runtime
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.compression.written import read_json, write_json
from trilevel.errors import InputError
from trilevel.report.machine import machine_block
from trilevel.routing.executor import BatchRun, execute
from trilevel.routing.features import features_of
from trilevel.routing.latency import LatencyTable, measure
from trilevel.routing.outcomes import Outcomes, load_outcomes
from trilevel.routing.paths import Family, PathSet
from trilevel.routing.router import margin
from trilevel.routing.samples import Samples


def batches_of(task: str) -> tuple[int, ...]:
    """Sizes that are timed; documents of one length seldom meet, and 32 long ones fill the memory."""
    return (1, 2) if task == "documents" else (1, 8, 32)


_LENGTHS = 4
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What paths are run with: runtime, threads, precision of what is not quantized."""

    runtime: Runtime
    threads: int | None = None
    precision: Precision = "float32"

    def open(self, artifact: Artifact) -> dict[str, SegmentSteps]:
        """The steps of all families, the full path's last."""
        options: dict[str, Any] = {"threads": self.threads, "precision": self.precision}
        steps = {name: SegmentSteps(artifact, name, self.runtime, **options) for name in artifact.manifest.families}
        if FULL_FAMILY in steps:
            return steps
        return steps | {FULL_FAMILY: SegmentSteps(artifact, None, self.runtime, **options)}

    def key(self, artifact: Artifact, steps: Mapping[str, SegmentSteps]) -> dict[str, Any]:
        """What answers and times depend on."""
        version = next(iter(steps.values())).version
        return {
            "model": model_hash(artifact),
            "runtime": self.runtime,
            "version": version,
            "isa": isa_class(),
            "threads": self.threads,
            "precision": self.precision,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """Another model for all samples, which paths are compared with: its artifact as one graph, and what runs it."""

    artifact: Artifact
    machine: Machine
    steps: SegmentSteps

    def run(self, arrays: Arrays) -> None:
        """For times."""
        self.steps.run(0, arrays)


def open_statics(artifact: Artifact, machine: Machine, folders: Sequence[str | Path]) -> dict[str, Static]:
    """Other models by name: those of artifacts; the full path in bfloat16 where runtime and processor compute in it.

    Raises:
        ArtifactError: a folder is none.
        InputError: its model reads or answers something else, or two have one name.
    """
    found: dict[str, Static] = {}
    ours = _interface(artifact)
    for folder in folders:
        other = read_artifact(folder)
        theirs = _interface(other)
        name = Path(folder).resolve().name
        if name in found:
            raise InputError(f"two static models are named {name!r}. Rename a folder: it is the name in the report.")
        wrong = [what for what in ours if theirs[what] != ours[what]]
        if wrong:
            raise InputError(
                f"{folder} has other {', '.join(wrong)} than the model that is routed, so the two cannot be compared."
            )
        found[name] = _static(other, machine)
    if "bfloat16" in precisions(machine.runtime) and machine.precision == "float32" and has_bfloat16_products():
        found["full path in bfloat16"] = _static(artifact, replace(machine, precision="bfloat16"))
    return found


def _static(artifact: Artifact, machine: Machine) -> Static:
    whole = replace(artifact, manifest=replace(artifact.manifest, families={}))
    return Static(artifact=whole, machine=machine, steps=machine.open(whole)[FULL_FAMILY])


def _interface(artifact: Artifact) -> dict[str, Any]:
    """What two models must share to be compared on the same rows."""
    manifest = artifact.manifest
    return {
        "task": manifest.task,
        "inputs": dict(manifest.inputs),
        "outputs": dict(manifest.outputs),
        "labels": manifest.settings.get("labels"),
        "tokenizer": artifact.hashes.get(TOKENIZER_FILE),
    }


def collect(
    artifact: Artifact,
    machine: Machine,
    samples: Samples,
    steps: Mapping[str, SegmentSteps],
    kept: Path,
    *,
    progress: Progress,
    what: str,
) -> Outcomes:
    """What every path answers for samples, from a file if it was found before."""
    key = machine.key(artifact, steps) | {"samples": samples.sha256}
    del key["threads"]
    if read_json(kept.with_suffix(".json")) == key and kept.exists():
        return load_outcomes(kept)
    names, features = features_of(samples.task)
    outputs: list[list[npt.NDArray[Any]]] = [[] for _ in range(len(samples))]
    paths = []
    total, done = len(samples) * len(steps), 0
    for family, own in steps.items():
        deepest = Family.parse(family).at(own.num_segments)

        def count(run: BatchRun, name: str = family, last: int = own.num_segments - 1) -> None:
            nonlocal done
            done += run.batch if run.segment == last else 0
            progress(f"{what}: {name}", done / total)

        routed = execute(
            samples.rows, {family: own}, PathSet(paths=(deepest,), full=deepest), None, max_batch=32,
            length_of=samples.length_of, collate=samples.collate, on_batch=count,
        )  # fmt: skip
        for said, one in zip(outputs, routed, strict=True):
            said.extend(one.outputs)
        paths += [Family.parse(family).at(segment + 1).name for segment in range(own.num_segments)]
    predictions, grades = _judged(samples, outputs)
    found = Outcomes(
        paths=tuple(paths),
        full=artifact.manifest.full_path,
        predictions=predictions,
        margins=np.array([margin(np.stack(said)) for said in outputs]),
        features=np.concatenate([features(samples.collate([row], samples.length_of(row))) for row in samples.rows]),
        lengths=samples.lengths,
        groups=samples.groups,
        labels=samples.labels,
        grades=grades,
    )
    assert found.features.shape[1] == len(names)
    found.save(kept)
    write_json(kept.with_suffix(".json"), key)
    return found


def _judged(
    samples: Samples, outputs: Sequence[Sequence[npt.NDArray[Any]]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64] | None]:
    """Classes, or columns of the first path with the same answer, and grades, both (samples, paths).

    Without a grade for each sample there are none: a promise about grades is then refused.
    """
    if samples.judge is None:
        return np.array([np.stack(said).argmax(-1) for said in outputs]), None
    pairs = [samples.judge(row, np.stack(said)) for row, said in zip(samples.rows, outputs, strict=True)]
    columns = [[list(answers).index(one) for one in answers] for answers, _ in pairs]
    grades = [grades for _, grades in pairs]
    return np.array(columns, np.int64), np.array(grades, np.float64) if all(grades) else None


def time_paths(
    artifact: Artifact,
    machine: Machine,
    samples: Samples,
    steps: Mapping[str, SegmentSteps],
    kept: Path,
    *,
    batches: Sequence[int],
    statics: Mapping[str, Static] | None = None,
    budget_s: float = 60.0,
    progress: Progress,
) -> LatencyTable:
    """Milliseconds of every segment at usual batches and lengths, from a file if measured before on this machine."""
    others = {name: one.machine.key(one.artifact, {name: one.steps}) for name, one in (statics or {}).items()}
    key = machine.key(artifact, steps) | {"batches": list(batches), "samples": samples.sha256, "statics": others}
    before = read_json(kept)
    if before.get("key") == key:
        return LatencyTable.from_dict(before["table"])
    _, features = features_of(samples.task)
    lengths = np.unique(np.quantile(samples.lengths, np.linspace(0, 1, _LENGTHS), method="nearest")).tolist()
    table = measure(
        steps,
        samples.example,
        batches=batches,
        lengths=[int(length) for length in lengths],
        machine=machine_block(),
        router=features,
        others={name: one.run for name, one in (statics or {}).items()},
        budget_s=budget_s,
        progress=progress,
    )
    write_json(kept, {"key": key, "table": table.to_dict()})
    return table


def sample_ms(table: LatencyTable, outcomes: Outcomes, batch: int) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each path for each sample at a batch size, (samples,) by the path's name."""
    lengths = np.clip(outcomes.lengths, table.lengths[0], table.lengths[-1])
    return {path: table.ms(path, batch, lengths) / batch for path in outcomes.paths}
