"""What the rows of an artifact go through: their arrays and queues, the rule that sends them, and why it did."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt

from trilevel.artifact.explain import Asked, Explanation
from trilevel.artifact.manifest import Artifact, Tensors
from trilevel.artifact.routed import (
    LENGTH_STEP,
    MASK,
    has_paths,
    lengths_of,
    paths_of,
    read_certificate,
    read_latency,
    read_router,
)
from trilevel.artifact.runtime.predictor import check_inputs
from trilevel.routing.certificate import Certificate
from trilevel.routing.executor import Route, routes_of
from trilevel.routing.features import features_of
from trilevel.routing.harm import NEVER
from trilevel.routing.latency import LatencyTable
from trilevel.routing.paths import Family
from trilevel.routing.router import START, FamilyRule, Rule
from trilevel.routing.targets import parse_target
from trilevel.serving.latency_fit import LatencyFit
from trilevel.serving.requests import Arrays, TensorSpec

Array = npt.NDArray[Any]


class Key(NamedTuple):
    """What may run in one batch: rows of the same shapes before the same segment."""

    route: Route
    segment: int
    shapes: tuple[tuple[int, ...], ...]
    length: int


class Piece(NamedTuple):
    """A row of a request, with a first axis of 1."""

    arrays: dict[str, Array]
    shapes: tuple[tuple[int, ...], ...]
    length: int


@final
class Plan:
    """See the module. Reading it needs no runtime.

    Args:
        artifact: to serve.
        facts: what its workers say of it, see `opener`.

    Attributes:
        full: the route of rows that no rule sends elsewhere.
        specs: of inputs and outputs.
        certificate: None where nothing is promised.
        reason: why every row takes the full path; empty if they do not.

    Raises:
        ArtifactError, CertificateError: a file is damaged.
    """

    def __init__(self, artifact: Artifact, facts: Mapping[str, Any]) -> None:
        manifest = artifact.manifest
        self.task, self.settings = manifest.task, manifest.settings
        self._inputs, self._outputs = manifest.inputs, manifest.outputs
        self._pads = _pads(manifest.inputs, manifest.outputs)
        self.specs = _specs(manifest.inputs), _specs(manifest.outputs)
        self._max_tokens = int(manifest.settings.get("max_tokens", 1 << 30))
        self._padding = {"input_ids": int(manifest.settings.get("padding_id", 0))}
        self.rule: Rule | None = None
        self.certificate: Certificate | None = None
        self.reason = str(facts["reason"])
        self._table: LatencyTable | None = None
        self.full = Route("", (), 1)
        self.full_name = f"{manifest.precision}/1"
        self._routes: dict[str, Route] = {}
        if has_paths(artifact):
            self._open(artifact, is_routed=bool(facts["is_routed"]))

    def _open(self, artifact: Artifact, *, is_routed: bool) -> None:
        router = read_router(artifact)
        paths = paths_of(router)
        self._routes = routes_of(paths)
        self.full_name, self.full = router.full, self._routes[router.full]
        self._table = read_latency(artifact)
        self._paths = paths.names
        self._features = features_of(artifact.manifest.task)[1]
        if is_routed:
            self.certificate = read_certificate(artifact, router)
            assert self.certificate is not None
            self.rule = Rule(router=router, setting=self.certificate.setting)

    def stop(self, reason: str) -> None:
        """Send every row through the full path from now on."""
        self.rule, self.reason = None, reason

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of those that rows may take, the full one last."""
        return (self.full_name,) if self.rule is None else self._paths

    @property
    def bound(self) -> float:
        """The largest mean loss that is promised; 0 where every row takes the full path."""
        if self.rule is None or self.certificate is None:
            return 0.0
        return max(parse_target(proof.target).alpha for proof in self.certificate.proofs)

    def check(self, inputs: Arrays) -> None:
        """Raise InputError unless these are inputs of the graph, of one row at least."""
        check_inputs(self._inputs, inputs)

    def features(self, inputs: Arrays) -> Array | None:
        """Of each row (rows, features), for the rule; None if there is none."""
        return None if self.rule is None else self._features(inputs)

    def start(self, features: Array | None) -> list[Route] | None:
        """Where each row begins; None if all begin with the full path."""
        if self.rule is None or features is None:
            return None
        return [self._routes[name] for name in self.rule.start(features)]

    def margins(self, route: Route, segment: int) -> tuple[float | None, ...]:
        """From a segment on, the margin from which rows leave behind each; None where nobody is asked."""
        found: list[float | None] = [None] * route.last
        for depth in route.asked:
            path = Family.parse(route.family).at(depth).name
            found[depth - 1] = NEVER if self.rule is None else self.rule.setting[path]
        return tuple(found[segment:])

    def leaves(self, route: Route, segment: int, outputs: Array) -> tuple[Array, Array] | None:
        """Which rows leave behind a segment, and how sure their answers are; None where nobody is asked."""
        if segment + 1 not in route.asked:
            return None
        if self.rule is None:
            # an alarm came while they were on their way: none is believed
            return np.zeros(len(outputs), np.bool_), np.full(len(outputs), np.nan)
        # the rule reads the last head alone, and no features
        verdict = self.rule.after(route.family, segment, outputs[:, None], np.empty((len(outputs), 0)))
        return verdict.leave, verdict.margin

    def longest(self, inputs: Arrays) -> int:
        """The length of the longest row, about."""
        if MASK in inputs:
            return max(1, int(inputs[MASK].sum(1).max()))
        tokens = inputs.get("input_ids")
        return 1 if tokens is None else tokens.shape[1]

    def pieces(self, inputs: Arrays) -> list[Piece]:
        """The rows of a request, each cut or padded to a length that others have too, so that they share batches."""
        if self._pads:
            return [self._padded(inputs, row, length) for row, length in enumerate(lengths_of(inputs).tolist())]
        shapes = tuple(inputs[name].shape[1:] for name in self._inputs)
        length = self.longest(inputs) if MASK not in inputs else next(iter(inputs.values())).shape[1]
        count = len(next(iter(inputs.values())))
        if count == 1:
            return [Piece(dict(inputs), shapes, length)]
        return [
            Piece({name: inputs[name][row : row + 1] for name in self._inputs}, shapes, length) for row in range(count)
        ]

    def _padded(self, inputs: Arrays, row: int, length: int) -> Piece:
        wanted = max(length, min(self._max_tokens, -(-max(1, length) // LENGTH_STEP) * LENGTH_STEP))
        arrays = {}
        for name in self._inputs:
            given = inputs[name][row : row + 1, :wanted]
            if given.shape[1] < wanted:
                whole = np.full((1, wanted), self._padding.get(name, 0), given.dtype)
                whole[:, : given.shape[1]] = given
                given = whole
            arrays[name] = given
        return Piece(arrays, ((wanted,),), wanted)

    def fit(self, key: Hashable) -> LatencyFit:
        """What was measured of a queue's batches when the artifact was made."""
        assert isinstance(key, Key)
        if self._table is None or key.route.family not in self._table.through_ms:
            return LatencyFit()
        times = self._table.segment_ms(key.route.family)
        if key.segment >= len(times):
            return LatencyFit()
        place = int(np.argmin(np.abs(np.array(self._table.lengths) - key.length)))
        seconds = np.maximum(times[key.segment, :, place], 1e-3) / 1e3
        return LatencyFit(self._table.batches, seconds.tolist())

    def explained(
        self, features: Array | None, route: Route | None, margins: Sequence[float], path: str, length: int, reason: str
    ) -> dict[str, Any]:
        """Why a row took its path: JSON types, `said` for people.

        Args:
            features: of the row (1, features).
            route: that it began with; None for the full path.
            margins: of the answers that it was asked for, in order.
            path: that answered.
            length: of the row.
            reason: why no rule sent it; empty if one did.
        """
        if self.rule is None or features is None or reason:
            return {"path": path, "said": [f"path {path}: {reason or self.reason or 'the model has no other'}"]}
        rules, setting = self.rule.router.families, self.rule.setting
        starts = {rule.name: (float(rule.start.harm(features)[0]), setting[f"{rule.name}/{START}"]) for rule in rules}
        asked: tuple[Asked, ...] = ()
        if route is not None and route.asked:
            own = next(rule for rule in rules if rule.name == route.family)
            asked = tuple(self._asked(own, place, margin, length) for place, margin in enumerate(margins))
        full_ms = self._ms(self.full_name, length)
        spent = asked[-1].ms if asked else 0.0
        if path == self.full_name:
            restarts = asked and self.rule.router.restarts(own)
            spent = full_ms + (spent if restarts else 0.0)
        found = Explanation(path=path, starts=starts, asked=asked, ms=spent, full_ms=full_ms)
        return {
            "path": path,
            "starts": {name: {"harm": harm, "most": most} for name, (harm, most) in starts.items()},
            "asked": [
                {"path": one.path, "margin": one.margin, "harm": one.harm, "wanted": one.wanted, "ms": one.ms}
                for one in asked
            ],
            "ms": spent,
            "full_ms": full_ms,
            "said": found.said(),
        }

    def _asked(self, rule: FamilyRule, place: int, margin: float, length: int) -> Asked:
        assert self.rule is not None
        path = rule.paths[place]
        harm = float(rule.exits[place].harm(np.array([margin]))[0])
        wanted = self.rule.setting[path]
        return Asked(path=path, margin=margin, harm=harm, wanted=wanted, ms=self._ms(path, length))

    def _ms(self, path: str, length: int) -> float:
        assert self._table is not None
        lengths = self._table.lengths
        return float(self._table.ms(path, self._table.batches[0], min(max(length, lengths[0]), lengths[-1])))


def _specs(tensors: Mapping[str, Tensors]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name=name, dtype=own.dtype, shape=tuple(axis if isinstance(axis, int) else -1 for axis in own.axes))
        for name, own in tensors.items()
    )


def _pads(inputs: Mapping[str, Tensors], outputs: Mapping[str, Tensors]) -> bool:
    """Whether rows may be padded: all inputs have the mask's axes, whose length may vary, and no output has them."""
    if MASK not in inputs:
        return False
    axes = inputs[MASK].axes
    is_free = len(axes) == 2 and isinstance(axes[1], str)
    is_alike = all(own.axes == axes for own in inputs.values())
    return is_free and is_alike and not any(axes[1] in own.axes for own in outputs.values())
