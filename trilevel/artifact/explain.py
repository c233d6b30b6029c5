"""Why an input takes its path: what was asked on the way, what it answered, what would have changed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt

from trilevel.artifact.probe import Arrays
from trilevel.artifact.routed import RoutedPredictor, lengths_of, rows_of
from trilevel.errors import ArtifactError
from trilevel.routing.executor import run_path
from trilevel.routing.latency import LatencyTable
from trilevel.routing.router import START, FamilyRule, margin, start


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a path was asked.

    Attributes:
        path: its name.
        margin: of its answer.
        harm: expected of it.
        wanted: the margin from which it is taken.
        ms: by the latency table at batch 1, from the beginning.
    """

    path: str
    margin: float
    harm: float
    wanted: float
    ms: float

    @property
    def is_taken(self) -> bool:
        """Whether the input leaves here."""
        return self.margin >= self.wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why an input took its path.

    Attributes:
        path: that answered.
        starts: of each family, the harm expected before anything ran and the most that is allowed.
        asked: in order; empty if the full path was taken at once.
        ms: what it took with all that was run in vain.
        full_ms: what the full path takes.
    """

    path: str
    starts: Mapping[str, tuple[float, float]]
    asked: tuple[Asked, ...]
    ms: float
    full_ms: float

    def said(self) -> list[str]:
        """Sentences for people."""
        lines = [
            f"{name}: harm expected before anything runs {harm:.4f}, at most {most:.4f} is allowed"
            for name, (harm, most) in self.starts.items()
        ]
        for one in self.asked:
            end = "taken" if one.is_taken else f"{one.wanted - one.margin:.2f} more would have ended here"
            lines.append(
                f"{one.path}: margin {one.margin:.2f} of {one.wanted:.2f}, harm expected {one.harm:.4f}; {end}"
            )
        lines.append(
            f"path {self.path}: {self.ms:.1f} ms, {self.full_ms - self.ms:.1f} ms saved of the {self.full_ms:.1f} ms "
            "that the full path takes (latency table, batch 1)"
        )
        return lines


def explain(predictor: RoutedPredictor, table: LatencyTable, inputs: Arrays) -> list[Explanation]:
    """Why each row takes its path; rows are run one by one.

    Raises:
        ArtifactError: every row takes the full path; it says why.
        ConfigError: a row is longer or shorter than what was measured.
    """
    if predictor.rule is None:
        raise ArtifactError(predictor.reason)
    return [_explained(predictor, table, inputs, row, int(length)) for row, length in enumerate(lengths_of(inputs))]


class Recorder:
    """A `Predictor` that explains every row that it runs.

    Attributes:
        found: explanations, in the order of the rows.
    """

    def __init__(self, predictor: RoutedPredictor, table: LatencyTable) -> None:
        self._predictor, self._table = predictor, table
        self.runtime: str = predictor.runtime
        self.version, self.precision = predictor.version, predictor.precision
        self.found: list[Explanation] = []

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Logits (rows, classes)."""
        self.found += explain(self._predictor, self._table, inputs)
        return self._predictor.run(inputs)

    def kernels(self) -> Mapping[str, str]:
        """Those of the predictor."""
        return self._predictor.kernels()


def _explained(predictor: RoutedPredictor, table: LatencyTable, inputs: Arrays, row: int, length: int) -> Explanation:
    assert predictor.rule is not None
    router, setting = predictor.router, predictor.rule.setting
    features = predictor.features(rows_of(inputs, [row], length))
    starts = {
        rule.name: (float(rule.start.harm(features)[0]), setting[f"{rule.name}/{START}"]) for rule in router.families
    }
    begun = int(start(router, setting, features)[0])
    full_ms = _ms(table, router.full, length)
    if begun < 0:
        return Explanation(path=router.full, starts=starts, asked=(), ms=full_ms, full_ms=full_ms)
    asked = _asked(predictor, table, router.families[begun], inputs, row, length)
    spent = asked[-1].ms
    if asked[-1].is_taken:
        return Explanation(path=asked[-1].path, starts=starts, asked=asked, ms=spent, full_ms=full_ms)
    lost = spent if router.restarts(router.families[begun]) else 0.0
    return Explanation(path=router.full, starts=starts, asked=asked, ms=lost + full_ms, full_ms=full_ms)


def _asked(
    predictor: RoutedPredictor, table: LatencyTable, rule: FamilyRule, inputs: Arrays, row: int, length: int
) -> tuple[Asked, ...]:
    assert predictor.rule is not None
    deepest = predictor.paths[rule.paths[-1]]
    outputs = run_path(
        [row],
        predictor.steps[rule.name],
        deepest,
        max_batch=1,
        length_of=lambda _row: length,
        collate=partial(rows_of, inputs),
    )
    found: list[Asked] = []
    for name, curve in zip(rule.paths, rule.exits, strict=True):
        own = margin(outputs[:, predictor.paths[name].segments - 1])
        found.append(
            Asked(
                path=name,
                margin=float(own[0]),
                harm=float(curve.harm(own)[0]),
                wanted=predictor.rule.setting[name],
                ms=_ms(table, name, length),
            )
        )
        if found[-1].is_taken:
            break
    return tuple(found)


def _ms(table: LatencyTable, path: str, length: int) -> float:
    return float(table.ms(path, table.batches[0], min(max(length, table.lengths[0]), table.lengths[-1])))
