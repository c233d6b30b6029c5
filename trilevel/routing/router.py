"""The router: which family of paths an input begins with, and behind which segment it leaves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import ArtifactError, ConfigError
from trilevel.routing.executor import Verdict
from trilevel.routing.harm import NEVER, FeatureHarm, MarginHarm, fit_feature_harm, fit_margin_harm
from trilevel.routing.outcomes import Outcomes
from trilevel.routing.paths import Family, Path

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]
Booleans = npt.NDArray[np.bool_]
START = "start"
FORMAT = "trilevel-router"
VERSION = 1
_ROUNDS = 3
# shares of the samples that begin with a family
_STARTS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.8, 0.6)


def margin(logits: Floats) -> Floats:
    """Difference of the two largest of (..., classes).

    >>> margin(np.array([[1.0, 4.0, 2.5]]))
    array([1.5])
    """
    best = np.partition(logits, -2, axis=-1)
    return np.asarray(best[..., -1] - best[..., -2])


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRule:
    """What is known of a family's harm.

    Attributes:
        name: of the family.
        paths: its paths, each a segment longer than the one before.
        start: harm of the last of them, by features.
        exits: harm of each by its margin.
    """

    name: str
    paths: tuple[str, ...]
    start: FeatureHarm
    exits: tuple[MarginHarm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Rules of the families, cheapest first, and the path that everything else takes.

    An input begins with the first family whose start allows it and leaves behind the first segment whose margin
    allows it. Who passes all segments of a family without leaving takes the full path: from its beginning, or from
    where it is if the full path is the end of the same family.

    Attributes:
        full: name of the path that is never wrong by definition.
        families: rules.
        features: names of the features.
    """

    full: str
    families: tuple[FamilyRule, ...]
    features: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` gives an equal router back."""
        rules = [
            {
                "name": rule.name,
                "paths": list(rule.paths),
                "start": rule.start.to_dict(),
                "exits": [one.to_dict() for one in rule.exits],
            }
            for rule in self.families
        ]
        own = {"full": self.full, "families": rules, "features": list(self.features)}
        return {"format": FORMAT, "version": VERSION, **own}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Router:
        """What `to_dict` made.

        Raises:
            ArtifactError: it is none, or of another version.
        """
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise ArtifactError(
                f"this is no {FORMAT} of version {VERSION}, but {values.get('format')!r} of {values.get('version')!r}. "
                "Route the model again (trilevel route)."
            )
        try:
            rules = tuple(
                FamilyRule(
                    name=str(one["name"]),
                    paths=tuple(map(str, one["paths"])),
                    start=FeatureHarm.from_dict(one["start"]),
                    exits=tuple(MarginHarm(**own) for own in one["exits"]),
                )
                for one in values["families"]
            )
            found = cls(full=str(values["full"]), families=rules, features=tuple(map(str, values["features"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the router is damaged ({error}). Route the model again (trilevel route).") from error
        if any(len(rule.exits) != len(rule.paths) or not rule.paths for rule in rules):
            raise ArtifactError("the router has paths without a rule. Route the model again (trilevel route).")
        return found

    def restarts(self, rule: FamilyRule) -> bool:
        """Whether who passes a family unsure begins the full path anew; else it is the same family, further on."""
        return Path.parse(self.full).family.name != rule.name

    @property
    def sha256(self) -> str:
        """Of its JSON."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def fit_router(
    outcomes: Outcomes, losses: Floats, families: Mapping[str, Sequence[str]], features: Sequence[str]
) -> Router:
    """Fit on held-out samples, never on those that trained the model.

    Args:
        outcomes: of the samples.
        losses: (samples, paths) in [0, 1], what each answer costs beside that of the full path.
        families: paths of each, by the family's name, cheapest family first; the full path is in none.
        features: names of the outcomes' features.

    Raises:
        InputError: there is no sample, or no such path.
    """
    rules = []
    for name, paths in families.items():
        columns = [outcomes.column(path) for path in paths]
        exits = tuple(fit_margin_harm(outcomes.margins[:, column], losses[:, column]) for column in columns)
        start = fit_feature_harm(outcomes.features, losses[:, columns[-1]])
        rules.append(FamilyRule(name=name, paths=tuple(paths), start=start, exits=exits))
    return Router(full=outcomes.full, families=tuple(rules), features=tuple(features))


def thresholds(
    router: Router,
    price: float,
    ms: Mapping[str, float],
    *,
    saved: Mapping[str, float] | None = None,
    starts: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """What one number, the price, makes of a router: the most harm of a start, the least margin of an exit.

    Leaving is worth it where the harm expected is at most the price of what is saved, as a share of the full path's
    time. A price of 0 sends everything through the full path.

    Args:
        router: see there.
        price: of one full path's time, in harm, >= 0.
        ms: milliseconds of each path from its beginning, of a usual sample.
        saved: milliseconds that leaving behind each path saves; None for the most it can be: the rest of the family,
            the full path behind its last.
        starts: most harm with which each family is begun; None for any.

    Raises:
        ConfigError: the price is below 0, or a path has no time.
    """
    missing = [path for rule in router.families for path in (*rule.paths, router.full) if path not in ms]
    if not price >= 0 or missing:
        raise ConfigError(f"price={price} must be >= 0, and no time is known for {missing}.")
    saved = most_saved(router, ms) if saved is None else saved
    found: dict[str, float] = {}
    for rule in router.families:
        found[f"{rule.name}/{START}"] = (1.0 if starts is None else starts[rule.name]) if price else -1.0
        for path, harm in zip(rule.paths, rule.exits, strict=True):
            found[path] = harm.least_margin(price * saved[path] / ms[router.full])
    return found


def most_saved(router: Router, ms: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds that leaving behind each path saves at most."""
    full = ms[router.full]
    return {
        path: _most_saved(ms[path], ms[rule.paths[-1]], full, restarts=router.restarts(rule))
        for rule in router.families
        for path in rule.paths
    }


def _most_saved(own: float, last: float, full: float, *, restarts: bool) -> float:
    if not restarts:
        return full - own
    return full if own == last else last - own


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Where samples ended: the column of their path (samples,), and whether a family was left for the full path.

    `family` (samples,) is the number of the family that a sample began with, -1 for the full path.
    """

    column: Integers
    family: Integers
    is_escalated: Booleans

    def cost(self, outcomes: Outcomes, router: Router, ms: Mapping[str, npt.ArrayLike]) -> Floats:
        """Milliseconds of each sample, (samples,), from those of each path: one number, or (samples,)."""
        count = len(self.column)
        own = np.stack([np.broadcast_to(ms[path], count) for path in outcomes.paths])
        lost = np.stack(
            [np.broadcast_to(ms[rule.paths[-1]] if router.restarts(rule) else 0.0, count) for rule in router.families]
        )
        rows = np.arange(count)
        return np.asarray(own[self.column, rows] + np.where(self.is_escalated, lost[self.family, rows], 0.0))


def choose(outcomes: Outcomes, router: Router, setting: Mapping[str, float]) -> Chosen:
    """Route samples whose answers are all known already."""
    full = outcomes.column(outcomes.full)
    family = start(router, setting, outcomes.features)
    column = np.full(len(outcomes), full)
    is_open = family >= 0
    for number, rule in enumerate(router.families):
        for path in rule.paths:
            own = outcomes.column(path)
            leaves = is_open & (family == number) & (outcomes.margins[:, own] >= setting[path])
            column[leaves] = own
            is_open &= ~leaves
    return Chosen(column=column, family=family, is_escalated=is_open)


def start(router: Router, setting: Mapping[str, float], features: Floats) -> Integers:
    """The number of the family that each sample begins with, -1 for the full path; (samples,)."""
    found = np.full(len(features), -1)
    for number, rule in reversed(list(enumerate(router.families))):
        is_useful = any(setting[path] < NEVER for path in rule.paths)
        if is_useful:
            found[rule.start.harm(features) <= setting[f"{rule.name}/{START}"]] = number
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A router with one setting, as `execute` asks it."""

    router: Router
    setting: Mapping[str, float]

    def start(self, features: Floats) -> list[str]:
        """The family that each sample begins with, or the full path."""
        names = [*(rule.name for rule in self.router.families), self.router.full]
        return [names[number] for number in start(self.router, self.setting, features)]

    def after(self, family: str, segment: int, outputs: Floats, features: Floats) -> Verdict:
        """Which answers are sure enough."""
        margins = margin(outputs[:, -1])
        return Verdict(margins >= self.setting[Family.parse(family).at(segment + 1).name], margins)


def prices(count: int = 60) -> Floats:
    """From nothing to more than any harm, evenly by ratio."""
    return np.concatenate([[0.0], np.geomspace(1e-4, 10.0, count)])


def settings(
    outcomes: Outcomes, router: Router, ms: Mapping[str, float], wanted: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """Settings from safe to cheap: one for each price that makes the samples cheaper than all before.

    What leaving saves is what those that stay go on to take, found on the samples; families are begun with the most
    harm that makes the samples cheapest.
    """
    found, cheapest = [], np.inf
    for price in prices() if wanted is None else wanted:
        setting = _fitted(outcomes, router, ms, float(price))
        cost = choose(outcomes, router, setting).cost(outcomes, router, ms).mean()
        if cost < cheapest - 1e-9:
            found.append(setting)
            cheapest = cost
    return found


def _fitted(outcomes: Outcomes, router: Router, ms: Mapping[str, float], price: float) -> dict[str, float]:
    saved = most_saved(router, ms)
    for _ in range(_ROUNDS):
        saved |= _saved(outcomes, router, ms, thresholds(router, price, ms, saved=saved))
    best, cheapest = thresholds(router, price, ms, saved=saved), np.inf
    bounds = {rule.name: np.quantile(rule.start.harm(outcomes.features), _STARTS) for rule in router.families}
    for place in range(len(_STARTS)):
        starts = {name: float(own[place]) for name, own in bounds.items()}
        setting = thresholds(router, price, ms, saved=saved, starts=starts)
        cost = choose(outcomes, router, setting).cost(outcomes, router, ms).mean()
        if cost < cheapest - 1e-9:
            best, cheapest = setting, cost
    return best


def _saved(
    outcomes: Outcomes, router: Router, ms: Mapping[str, float], setting: Mapping[str, float]
) -> dict[str, float]:
    """What those that do not leave behind a path take afterwards, on average; nothing where all leave."""
    found = {}
    for rule in router.families:
        last = rule.paths[-1]
        rest = ms[router.full] - (0.0 if router.restarts(rule) else ms[last])
        later = np.where(outcomes.margins[:, outcomes.column(last)] >= setting[last], 0, rest)
        spent = {last: np.full(len(outcomes), rest)}
        for before, path in reversed(list(pairwise(rule.paths))):
            later = later + ms[path] - ms[before]
            spent[before] = later
            leaves = outcomes.margins[:, outcomes.column(before)] >= setting[before]
            later = np.where(leaves, 0, later)
        for path, own in spent.items():
            stays = outcomes.margins[:, outcomes.column(path)] < setting[path]
            if stays.any():
                found[path] = float(own[stays].mean())
    return found
