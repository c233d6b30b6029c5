"""From outcomes to a choice: fit on one part, fix the order there, prove on a second, report on a third."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import CertificateError, require
from trilevel.routing import rivals
from trilevel.routing.certify import Certified, certify, prove
from trilevel.routing.outcomes import Outcomes
from trilevel.routing.router import START, Router, choose, fit_router, prices, settings, thresholds
from trilevel.routing.targets import SIGNED, Target, losses_of

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]
Times = Callable[[Outcomes, int], Mapping[str, npt.ArrayLike]]
"""Milliseconds of each path for each sample, at a batch size."""
DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run the model, on samples that chose nothing.

    Attributes:
        name: of the way.
        kind: `fixed`, `dynamic`, `static` for another model, `random`, `oracle` or `rival`.
        ms: mean milliseconds of a sample, by batch size.
        loss: mean loss of the first target, on the scale of its bound.
        is_proved: whether the targets were proved for it; None for what no setting leads to.
        shares: of the paths.
    """

    name: str
    kind: str
    ms: Mapping[int, float]
    loss: float
    is_proved: bool | None
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What was chosen.

    Attributes:
        router: fitted on the tuning part.
        chain: the settings that were tested, safest first.
        kind: `dynamic`, or the name of the fixed path where routing does not pay.
        certified: the setting that was proved, with its proofs; None where nothing was.
        refusal: why nothing was.
        rows: what everything else takes and loses on the test part.
    """

    router: Router
    chain: tuple[Mapping[str, float], ...]
    kind: str
    certified: Certified | None
    refusal: str
    rows: tuple[Row, ...]

    @property
    def setting(self) -> Mapping[str, float]:
        """The thresholds that were proved; those of the full path where nothing was."""
        return self.chain[0 if self.certified is None else self.certified.setting]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Samples that fit, that prove, and that report; no group is in two of them."""

    tune: Outcomes
    prove: Outcomes
    test: Outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """Targets, the chance of being wrong, names of the classes."""

    targets: Sequence[Target]
    delta: float
    labels: tuple[str, ...] = ()

    def losses(self, outcomes: Outcomes, answers: Integers) -> list[tuple[Floats, npt.NDArray[np.bool_]]]:
        """Of each target, for answers (samples, ...)."""
        return [
            losses_of(
                one,
                answers,
                outcomes.full_predictions,
                truth=outcomes.labels,
                labels=self.labels,
                lost=outcomes.lost(answers),
            )
            for one in self.targets
        ]

    def path_losses(self, outcomes: Outcomes) -> Floats:
        """What each path's answer loses of the first target, (samples, paths), 0 for nothing; gains do not count."""
        first = self.targets[0]
        if first.kind in SIGNED:
            first = Target(kind="harm" if first.kind == "net" else "bounded", alpha=first.alpha)
        own = Promise(targets=[first], delta=self.delta, labels=self.labels)
        losses, counts = own.losses(outcomes, outcomes.predictions)[0]
        return losses * counts[:, None]

    def proved(self, outcomes: Outcomes, answers: Integers) -> Certified:
        """The cheapest proved column of answers (samples, settings), safest first; see `certify`."""
        return certify(self.targets, self.losses(outcomes, answers), delta=self.delta, groups=outcomes.groups)


def decide(
    parts: Parts,
    promise: Promise,
    families: Mapping[str, Sequence[str]],
    features: Sequence[str],
    times: Times,
    *,
    batches: Sequence[int] = (1,),
    statics: Mapping[str, tuple[Outcomes, Outcomes]] | None = None,
) -> Decision:
    """Choose between paths of their own for every sample, and one path for all.

    Which of the two is tested follows from the tuning part alone, so one test decides.

    Args:
        parts: see there.
        promise: what must hold.
        families: paths of each, cheapest family first.
        features: names of the outcomes' features.
        times: see `Times`.
        batches: sizes that the report shows; the first decides.
        statics: other models by name, which the report shows beside: what their full paths say of the samples that
            prove, and of those that report. `times` knows their names too.

    Raises:
        InputError: the data lacks what a target needs.
    """
    tune = parts.tune
    router = fit_router(tune, promise.path_losses(tune), families, features)
    ms = {path: float(np.asarray(own, np.float64).mean()) for path, own in times(tune, batches[0]).items()}
    dynamic, fixed = settings(tune, router, ms), fixed_settings(router, ms)
    chains = {DYNAMIC: dynamic, "fixed": [setting for _, setting in fixed]}
    expected = {name: _expected_ms(parts, promise, router, chain, ms) for name, chain in chains.items()}
    kind = DYNAMIC if expected[DYNAMIC] < expected["fixed"] else "fixed"
    certified, refusal = None, ""
    try:
        certified = promise.proved(parts.prove, answers(parts.prove, router, chains[kind]))
    except CertificateError as error:
        refusal = str(error)
    if kind == "fixed":
        kind = fixed[0 if certified is None else certified.setting][0]
    report = _Report(parts=parts, promise=promise, router=router, times=times, batches=batches)
    return Decision(
        router=router,
        chain=tuple(chains[DYNAMIC if kind == DYNAMIC else "fixed"]),
        kind=kind,
        certified=certified,
        refusal=refusal,
        rows=(*report.rows(dynamic, fixed, ms), *(report.static(name, *own) for name, own in (statics or {}).items())),
    )


def fixed_settings(router: Router, ms: Mapping[str, float]) -> list[tuple[str, dict[str, float]]]:
    """Each path as a setting that sends everything through it, the slowest first; the full path before all others."""
    never = thresholds(router, 0.0, ms)
    found = []
    for rule in router.families:
        for place, path in enumerate(rule.paths):
            own = {name: 0.0 if name in rule.paths[place:] else value for name, value in never.items()}
            own |= {f"{rule.name}/{START}": 1.0}
            found.append((path, own))
    return [(router.full, never), *sorted(found, key=lambda one: -ms[one[0]])]


def answers(outcomes: Outcomes, router: Router, chain: Sequence[Mapping[str, float]]) -> Integers:
    """Classes (samples, settings)."""
    rows = np.arange(len(outcomes))
    return np.stack([outcomes.predictions[rows, choose(outcomes, router, one).column] for one in chain], axis=1)


def _expected_ms(
    parts: Parts,
    promise: Promise,
    router: Router,
    chain: Sequence[Mapping[str, float]],
    ms: Mapping[str, float],
) -> float:
    """Time of the cheapest setting that the proving part would prove if it lost as the tuning part does."""
    best = ms[router.full]
    losses = promise.losses(parts.tune, answers(parts.tune, router, chain))
    for place, setting in enumerate(chain):
        for target, (matrix, counts) in zip(promise.targets, losses, strict=True):
            own = matrix[counts, place]
            units = int(counts.mean() * len(np.unique(parts.prove.groups)))
            drawn = np.random.default_rng(0).choice(own, units) if len(own) else own
            if prove(target, drawn, np.ones(len(drawn), bool), np.arange(len(drawn))).p_value > promise.delta:
                return best
        best = float(choose(parts.tune, router, setting).cost(parts.tune, router, ms).mean())
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    parts: Parts
    promise: Promise
    router: Router
    times: Times
    batches: Sequence[int]

    def rows(
        self,
        dynamic: Sequence[Mapping[str, float]],
        fixed: Sequence[tuple[str, Mapping[str, float]]],
        ms: Mapping[str, float],
    ) -> list[Row]:
        """Everything beside everything, on the test part."""
        test, proving = self.parts.test, self.parts.prove
        found = [
            self._of_setting(path, "fixed", setting, self._is_proved(answers(proving, self.router, [setting])))
            for path, setting in fixed
        ]
        place = self._last_proved(answers(proving, self.router, dynamic))
        chosen = self._of_setting("ours", DYNAMIC, dynamic[place or 0], place is not None)
        columns = choose(test, self.router, dynamic[place or 0]).column
        losses = self.promise.path_losses(test)
        matrix = rivals.path_ms(test, self.times(test, self.batches[0]))
        found += [
            chosen,
            self._of_columns("random, the same shares", "random", rivals.random_mix(columns, 0), None),
            self._of_columns("oracle", "oracle", rivals.oracle(losses, matrix), None),
        ]
        return found + [self._rival(name, guess, ms) for name, guess in self._guesses().items()]

    def static(self, name: str, prove: Outcomes, test: Outcomes) -> Row:
        """Another model for all samples."""
        is_class = bool(self.promise.labels)
        proving = self.parts.prove.beside(name, prove, is_class=is_class)
        parts = replace(self.parts, prove=proving, test=self.parts.test.beside(name, test, is_class=is_class))
        beside, column = replace(self, parts=parts), proving.column(name)
        is_proved = beside._is_proved(proving.predictions[:, [column]])
        return beside._of_columns(name, "static", np.full(len(parts.test), column), is_proved)

    def _guesses(self) -> dict[str, Callable[[Outcomes], Floats]]:
        """Harm of each path, by what is known before anything runs."""
        tune = self.parts.tune
        losses = self.promise.path_losses(tune)
        found: dict[str, Callable[[Outcomes], Floats]] = {
            "neighbours": lambda own: rivals.neighbour_harm(tune.features, losses, own.features)
        }
        for place, name in enumerate(self.router.features):
            found[f"by {name.replace('_', ' ')}"] = lambda own, place=place: rivals.binned_harm(  # type: ignore[misc]
                tune.features[:, place], losses, own.features[:, place]
            )
        return found

    def _rival(self, name: str, guess: Callable[[Outcomes], Floats], ms: Mapping[str, float]) -> Row:
        full = self.parts.test.column(self.router.full)

        def columns(own: Outcomes) -> list[Integers]:
            matrix, harm = rivals.path_ms(own, ms), guess(own)
            return [rivals.by_harm(harm, matrix, full, float(price)) for price in prices()]

        proving = self.parts.prove
        picked = [proving.predictions[np.arange(len(proving)), one] for one in columns(proving)]
        place = self._last_proved(np.stack(picked, axis=1))
        return self._of_columns(name, "rival", columns(self.parts.test)[place or 0], place is not None)

    def _is_proved(self, found: Integers) -> bool:
        return self._last_proved(found) is not None

    def _last_proved(self, found: Integers) -> int | None:
        try:
            return self.promise.proved(self.parts.prove, found).setting
        except CertificateError:
            return None

    def _of_setting(self, name: str, kind: str, setting: Mapping[str, float], is_proved: bool) -> Row:
        test = self.parts.test
        chosen = choose(test, self.router, setting)
        costs = {batch: chosen.cost(test, self.router, self.times(test, batch)).mean() for batch in self.batches}
        return self._row(name, kind, chosen.column, costs, is_proved)

    def _of_columns(self, name: str, kind: str, columns: Integers, is_proved: bool | None) -> Row:
        test = self.parts.test
        costs = {
            batch: rivals.picked(rivals.path_ms(test, self.times(test, batch)), columns).mean()
            for batch in self.batches
        }
        return self._row(name, kind, columns, costs, is_proved)

    def _row(self, name: str, kind: str, columns: Integers, costs: Mapping[int, Any], is_proved: bool | None) -> Row:
        test = self.parts.test
        matrix, counts = self.promise.losses(test, test.predictions[np.arange(len(test)), columns])[0]
        return Row(
            name=name,
            kind=kind,
            ms={batch: float(cost) for batch, cost in costs.items()},
            loss=self.promise.targets[0].shown(float(matrix[counts].mean())),
            is_proved=is_proved,
            shares=rivals.names(test.paths, columns),
        )


def most_changed(outcomes: Outcomes, decision: Decision, delta: float) -> float:
    """Upper bound of the share of answers that differ from the full path's: what an audit without labels may expect."""
    changed = answers(outcomes, decision.router, [decision.setting])[:, 0] != outcomes.full_predictions
    errors = int(changed.sum())
    stats = require("scipy.stats", extra="routing")
    return 1.0 if errors == len(changed) else float(stats.beta.ppf(1 - delta, errors + 1, len(changed) - errors))
