"""The segments of a family in a runtime, as dynamic paths run them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from trilevel.artifact.manifest import NEXT, Artifact
from trilevel.artifact.probe import Arrays
from trilevel.artifact.runtime.focus import KEPT, focused, scattered
from trilevel.artifact.runtime.predictor import Precision, Predictor, Runtime, load_predictor
from trilevel.routing.paths import Family

Outputs = npt.NDArray[Any]
AROUND = "special_tokens"
"""Setting of a documents artifact: how many stand before a document, and how many behind it."""


class SegmentSteps:
    """Segments one after another: see `trilevel.routing.steps.Steps`.

    Args:
        artifact: with paths.
        family: whose segments; None for the graph of the whole model, which is one segment.
        runtime, threads, precision: see `load_predictor`.

    Raises:
        ArtifactError: the artifact has no such family, or the runtime cannot read it.
    """

    def __init__(
        self,
        artifact: Artifact,
        family: str | None,
        runtime: Runtime,
        *,
        threads: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        count = 1 if family is None else max(1, len(artifact.manifest.families.get(family, ())))
        parts = [artifact if family is None else artifact.segment(family, number) for number in range(count)]
        self._inputs = [set(part.manifest.inputs) for part in parts]
        self._focus = None if family is None else Family.parse(family).focus_fraction
        before, behind = artifact.manifest.settings.get(AROUND, (0, 0))
        self._around = (int(before), int(behind))
        self._predictors: list[Predictor] = [
            load_predictor(part, runtime, threads=threads, precision=precision) for part in parts
        ]
        self.num_segments = len(parts)
        self.runtime, self.precision = runtime, precision
        self.version = self._predictors[0].version

    def run(
        self, segment: int, arrays: Arrays, *, ranks: Outputs | None = None
    ) -> tuple[dict[str, npt.NDArray[Any]], Outputs]:
        """What the next segment reads, and the outputs (batch, ...) of the head, of inputs or of the state before.

        With focus only some units go on behind the first segment, by its scores, or by `ranks` where given.
        """
        found = self._predictors[segment].run(
            {name: array for name, array in arrays.items() if name in self._inputs[segment]} if segment else arrays
        )
        state = {name.removeprefix(NEXT): found.pop(name) for name in list(found) if name.startswith(NEXT)}
        (outputs,) = found.values()
        if KEPT in arrays:
            outputs = scattered(outputs, arrays[KEPT])
        if segment + 1 == self.num_segments:
            return {}, outputs
        state = self._kept(segment + 1, arrays) | state
        if self._focus is not None and segment == 0:
            state = focused(state, outputs if ranks is None else ranks, self._focus, self._around)
        return state, outputs

    def _kept(self, segment: int, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Inputs that the next segment reads too, such as the mask."""
        return {name: array for name, array in arrays.items() if name in self._inputs[segment] or name == KEPT}

    def kernels(self) -> dict[str, str]:
        """What is executed, by the segment's number and the operator's name."""
        return {
            f"{number}: {name}": kind
            for number, predictor in enumerate(self._predictors, 1)
            for name, kind in predictor.kernels().items()
        }
