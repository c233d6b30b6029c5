"""An artifact's answers in every runtime, on its own probes and on a user's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from trilevel.applications.artifacts import open_task
from trilevel.artifact.check import Checked, check_runtimes, installed, precisions
from trilevel.artifact.manifest import Artifact
from trilevel.artifact.path_probes import path_parity
from trilevel.artifact.probe import Arrays, Probe, read_probes
from trilevel.artifact.runtime.predictor import Precision, Predictor, Runtime, load_predictor
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.artifact.verify import Parity, chosen_tokens, overlap, parity
from trilevel.errors import ArtifactError, InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a runtime did in a precision.

    Attributes:
        checked: on the probes.
        overlap: share of the chosen global tokens that the reference chose too; None where it cannot be told.
        data: parity with the reference on the user's inputs; None without any.
        family: of paths whose segments were run; empty for the graph.
    """

    checked: Checked
    overlap: float | None = None
    data: Parity | None = None
    family: str = ""

    @property
    def holds(self) -> bool:
        """Whether all answers are those expected."""
        return self.checked.holds and (self.data is None or self.data.holds)


class _Recorder:
    """A predictor that keeps what it was asked and what it said."""

    def __init__(self, inner: Predictor) -> None:
        self._inner = inner
        self.runtime, self.version, self.precision = inner.runtime, inner.version, inner.precision
        self.probes: list[Probe] = []

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """As the inner one."""
        found = self._inner.run(inputs)
        self.probes.append(Probe(inputs=dict(inputs), outputs=found))
        return found

    def kernels(self) -> Mapping[str, str]:
        """As the inner one."""
        return self._inner.kernels()


def compare(
    artifact: Artifact,
    *,
    runtimes: Sequence[Runtime] = (),
    data: str | Path | None = None,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda _what: None,
) -> list[Row]:
    """Run probes and inputs in each runtime and precision.

    Args:
        artifact: of `read_artifact`.
        runtimes: asked for; empty takes those installed.
        data: a file or folder of the kind that `trilevel predict` takes. There the reference is torch where it is
            installed, else the first runtime.
        threads: that a call may use.
        tell: told what is being done.

    Raises:
        MissingExtraError: a runtime that was asked for is not installed.
        InputError: the data cannot be used.
    """
    asked = list(runtimes) or installed(artifact)
    every: list[Precision] = ["float32", "bfloat16"]
    checked = check_runtimes(artifact, asked, chosen=every, threads=threads, tell=tell)
    first: Runtime = "torch" if "torch" in installed(artifact) else asked[0]

    def opened(own: Artifact, runtime: Runtime, precision: Precision) -> Predictor:
        return load_predictor(own, runtime, threads=threads, precision=precision)

    recorder = _Recorder(opened(artifact, first, precisions(first)[0]))
    if data is not None:
        tell(f"running {data} in {first}")
        _predict(open_task(artifact, recorder), artifact.manifest.task, str(data))
    calls = [probe.inputs for probe in (*read_probes(artifact), *recorder.probes[:_MOST_CALLS])]
    tell("comparing the chosen tokens")
    wanted = chosen_tokens(artifact, lambda own: opened(own, first, "float32"), calls)
    rows = []
    for one in checked:
        if one.parity is None:
            rows.append(Row(checked=one))
            continue
        found = chosen_tokens(artifact, lambda own, one=one: opened(own, one.runtime, one.precision), calls)
        shared = overlap(found, wanted) if any(wanted) else None
        row = Row(checked=one, overlap=shared)
        if recorder.probes:
            tell(f"running {data} in {one.runtime} in {one.precision}")
            row = replace(row, data=parity(artifact, opened(artifact, one.runtime, one.precision), recorder.probes))
        rows.append(row)
    return [*rows, *(row for runtime in asked for row in _of_paths(artifact, runtime, threads, tell))]


def _of_paths(artifact: Artifact, runtime: Runtime, threads: int | None, tell: Callable[[str], None]) -> Iterator[Row]:
    """The segments of every family, one after another."""
    for family in artifact.manifest.families:
        tell(f"comparing the segments of {family} with {runtime}")
        try:
            steps = SegmentSteps(artifact, family, runtime, threads=threads)
            found = path_parity(artifact, {family: steps})[family]
        except (ArtifactError, InputError) as error:
            yield Row(checked=Checked(runtime=runtime, precision="float32", error=str(error)), family=family)
            continue
        checked = Checked(runtime=runtime, precision="float32", version=steps.version, parity=found)
        yield Row(checked=checked, family=family)


_MOST_CALLS = 16


def _predict(task: Any, kind: str, data: str) -> None:
    if kind == "images":
        from trilevel.applications.images.predictions import files

        task.predict(files([data]))
        return
    from trilevel.applications.classification.predictions import items

    if kind == "documents":
        task.predict([Path(data)])
        return
    texts = [item.text for item in items([data], text_column=getattr(task, "text_column", "text")) if item.text]
    if not texts:
        raise InputError(f"{data} holds no text to compare with.")
    task.predict(texts)
