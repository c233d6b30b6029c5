"""An artifact with paths as a runtime: each row takes its own path, or the full one where nothing is certified."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import CERTIFICATE_FILE, LATENCY_FILE, MODEL_FILE, ROUTER_FILE, Artifact
from trilevel.artifact.platform import isa_class
from trilevel.artifact.probe import Arrays
from trilevel.artifact.runtime.predictor import Precision, Predictor, Runtime
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.errors import ArtifactError, InputError
from trilevel.routing.certificate import Certificate, Platform, digest
from trilevel.routing.executor import Routed, execute
from trilevel.routing.features import features_of
from trilevel.routing.latency import LatencyTable
from trilevel.routing.paths import PathSet
from trilevel.routing.router import Router, Rule

MASK = "attention_mask"
LENGTH_STEP = 32
MAX_BATCH = 32


def model_hash(artifact: Artifact) -> str:
    """SHA-256 of all graphs of an artifact, what its certificate is bound to."""
    return digest({name: artifact.hashes[name] for name in (MODEL_FILE, *sorted(artifact.manifest.segment_files))})


def has_paths(artifact: Artifact) -> bool:
    """Whether rows may take different paths."""
    return bool(artifact.manifest.families) and ROUTER_FILE in artifact.hashes


def read_router(artifact: Artifact) -> Router:
    """The router of an artifact with paths.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    if not has_paths(artifact):
        raise ArtifactError(f"{artifact.path} has no paths. Make an artifact that has with trilevel route.")
    return Router.from_dict(_read(artifact, ROUTER_FILE))


def read_latency(artifact: Artifact) -> LatencyTable:
    """The latency table of an artifact with paths.

    Raises:
        ArtifactError, InputError: there is none, or it is damaged.
    """
    return LatencyTable.from_dict(_read(artifact, LATENCY_FILE))


def read_certificate(artifact: Artifact, router: Router) -> Certificate | None:
    """The certificate, None where nothing was certified.

    Raises:
        CertificateError: it was edited, or is of another model or router.
    """
    if CERTIFICATE_FILE not in artifact.hashes:
        return None
    certificate = Certificate.from_dict(_read(artifact, CERTIFICATE_FILE))
    certificate.check({"model": model_hash(artifact), "router": router.sha256})
    return certificate


def _read(artifact: Artifact, name: str) -> Any:
    try:
        return json.loads(artifact.file(name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{artifact.path / name} is no JSON ({error}). Route the model again.") from error


def paths_of(router: Router) -> PathSet:
    """All paths of a router."""
    return PathSet.parse([*(path for rule in router.families for path in rule.paths), router.full], full=router.full)


def lengths_of(inputs: Arrays) -> npt.NDArray[np.int64]:
    """What each row is padded to, (rows,): a few tokens more than it has; documents stay as they are; 1 for images."""
    if MASK not in inputs:
        length = inputs["input_ids"].shape[1] if "unit_ends" in inputs else 1
        return np.full(len(next(iter(inputs.values()))), length, np.int64)
    real = np.asarray(inputs[MASK].sum(1), np.int64)
    return np.minimum(inputs[MASK].shape[1], -(-real // LENGTH_STEP) * LENGTH_STEP)


def rows_of(inputs: Arrays, rows: Sequence[int], length: int) -> dict[str, npt.NDArray[Any]]:
    """Some rows, cut to a length where they have one."""
    chosen = list(rows)
    if MASK not in inputs:
        return {name: array[chosen] for name, array in inputs.items()}
    return {name: np.ascontiguousarray(array[chosen, :length]) for name, array in inputs.items()}


class RoutedPredictor:
    """See `Predictor`; rows of a call take different paths.

    Args:
        artifact: with paths.
        runtime, threads, precision: see `load_predictor`.
        setting: thresholds in place of the certificate's, to try them; nothing is promised of them.

    Attributes:
        certificate: what is promised; None without a certificate, and where it is of another platform.
        reason: why all rows take the full path; empty if they do not.

    Raises:
        ArtifactError, CertificateError: a file is damaged, edited, or of another model.
    """

    def __init__(
        self,
        artifact: Artifact,
        runtime: Runtime,
        *,
        threads: int | None = None,
        precision: Precision = "float32",
        setting: Mapping[str, float] | None = None,
    ) -> None:
        self.router = read_router(artifact)
        self.runtime: str = runtime
        self.precision = precision
        _, self.features = features_of(artifact.manifest.task)
        self._inputs = artifact.manifest.inputs
        (self._output,) = artifact.manifest.outputs
        self.paths = paths_of(self.router)
        options: dict[str, Any] = {"threads": threads, "precision": precision}
        full = self.paths.full.family.name
        self.steps = {
            full: SegmentSteps(artifact, full if full in artifact.manifest.families else None, runtime, **options)
        }
        self.version = self.steps[full].version
        self.certificate: Certificate | None = None
        self.reason = ""
        if setting is None:
            setting = self._certified(artifact)
        self.rule = None if setting is None else Rule(router=self.router, setting=setting)
        if self.rule is not None:
            for rule in (rule for rule in self.router.families if rule.name not in self.steps):
                self.steps[rule.name] = SegmentSteps(artifact, rule.name, runtime, **options)

    def _certified(self, artifact: Artifact) -> Mapping[str, float] | None:
        """The certificate's thresholds, if it is of this platform."""
        certificate = read_certificate(artifact, self.router)
        if certificate is None:
            self.reason = "nothing is certified"
        elif difference := certificate.platform.difference(self.platform):
            self.reason = f"the certificate was made elsewhere: {difference}"
        else:
            self.certificate = certificate
            return certificate.setting
        self.reason += f", so every input takes the full path. To certify here: trilevel certify {artifact.path} DATA"
        return None

    def stop(self, reason: str) -> None:
        """Send every row through the full path from now on."""
        self.rule, self.reason = None, reason

    @property
    def whole(self) -> Predictor:
        """The full path for every row."""
        twin = copy.copy(self)
        twin.rule = None
        return twin

    @property
    def platform(self) -> Platform:
        """Where this runs."""
        return Platform(runtime=self.runtime, version=self.version, isa=isa_class(), precision=self.precision)

    def route(self, inputs: Arrays) -> list[Routed]:
        """What each row got.

        Raises:
            InputError: the graph has other inputs.
        """
        if set(inputs) != set(self._inputs):
            raise InputError(f"inputs {sorted(inputs)} were given; the graph takes {sorted(self._inputs)}.")
        lengths = lengths_of(inputs)
        is_routed = self.rule is not None
        return execute(
            range(len(lengths)),
            self.steps,
            self.paths if is_routed else PathSet(paths=(self.paths.full,), full=self.paths.full),
            self.rule,
            max_batch=MAX_BATCH,
            length_of=lambda row: int(lengths[row]),
            collate=partial(rows_of, inputs),
            features=self.features(inputs) if is_routed else None,
        )

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """The graph's output (rows, ...)."""
        return {self._output: np.stack([one.output for one in self.route(inputs)])}

    def kernels(self) -> Mapping[str, str]:
        """Of the full path and of all segments."""
        found: dict[str, str] = {}
        for name, steps in self.steps.items():
            found |= {f"{name}: {operator}": kind for operator, kind in steps.kernels().items()}
        return found
