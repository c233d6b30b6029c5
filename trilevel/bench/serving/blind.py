"""Workers that know no paths: a batch stays together until its deepest row leaves, as where batches form by arrival.

Answers, segments, runtime, queues and processes are those of the server itself; only the batches differ. The engine
sees a model with one path, all of whose work is done in the first segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.routed import RoutedPredictor
from trilevel.errors import ArtifactError
from trilevel.routing.executor import Route, routes_of
from trilevel.routing.router import Rule
from trilevel.serving.requests import Arrays

OPENER = f"{__name__}:open_blind"
_ANSWER = "answer"
Array = npt.NDArray[Any]


@final
class BlindRunner:
    """See the module, and `trilevel.serving.worker.Runner`."""

    def __init__(self, predictor: RoutedPredictor, rule: Rule, output: str) -> None:
        self._predictor, self._rule, self._output = predictor, rule, output
        platform = dataclasses.asdict(predictor.platform)
        self.facts = {"platform": platform, "is_routed": False, "reason": "batches know no paths here"}

    def run(self, family: str, segment: int, arrays: Arrays) -> tuple[Arrays, Arrays]:
        """Everything in the first segment, nothing in the others."""
        answer = arrays[_ANSWER] if segment else self._answers(arrays)
        return {_ANSWER: answer}, {self._output: answer}

    def _answers(self, arrays: Arrays) -> Array:
        """Each row's own answer (rows, ...), for the price of the deepest."""
        starts, full = self._rule.start(self._predictor.features(arrays)), self._predictor.paths.full.name
        routes, found = routes_of(self._predictor.paths), dict[int, Array]()
        for name in sorted(set(starts) - {full}):
            self._through(routes[name], arrays, {row for row, own in enumerate(starts) if own == name}, found)
        rest = set(range(len(starts))) - found.keys()
        if rest:
            self._through(routes[full], arrays, rest, found)
        return np.concatenate([found[row] for row in range(len(starts))])

    def _through(self, route: Route, state: Arrays, rows: set[int], found: dict[int, Array]) -> None:
        """Take the whole batch along a route until those rows have left."""
        for segment in range(route.last):
            state, outputs = self._predictor.steps[route.family].run(segment, state)
            leave = np.full(len(outputs), segment + 1 == route.last)
            if segment + 1 in route.asked:
                leave = self._rule.after(route.family, segment, outputs[:, None], np.empty((len(outputs), 0))).leave
            for row in [row for row in rows if leave[row]]:
                found[row] = outputs[row : row + 1]
                rows.discard(row)
            if not rows:
                return


def open_blind(options: Mapping[str, Any]) -> BlindRunner:
    """What `trilevel.serving.opener.open_artifact` opens, blind; raises ArtifactError where nothing is certified."""
    artifact = read_artifact(options["folder"])
    predictor = RoutedPredictor(artifact, options["runtime"], threads=options["threads"])
    if predictor.rule is None:
        raise ArtifactError(f"{artifact.path}: {predictor.reason}.")
    (output,) = artifact.manifest.outputs
    return BlindRunner(predictor, predictor.rule, output)
