"""A routed artifact that watches itself: a share of its answers is compared with the full path's, until an alarm."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.artifact.probe import Arrays
from trilevel.artifact.routed import RoutedPredictor
from trilevel.errors import ConfigError
from trilevel.routing.audit import Audit, AuditConfig
from trilevel.routing.certificate import SEAL, Certificate
from trilevel.routing.executor import Routed
from trilevel.routing.targets import parse_target

_LOG = logging.getLogger(__name__)


class AuditedPredictor:
    """See `Predictor`; after an alarm every row takes the full path, now and after a restart.

    What is watched is disagreement, which needs no labels and bounds the harm: a certificate of agreement is watched at
    its own bound, any other at what its calibration saw (`measured` of the certificate), or its bound if that is more.

    Args:
        predictor: with a certificate of this platform.
        state: file of the audit; it is made if it is not there, and goes on if it is.
        shadow_share: share of the rows that are compared.

    Raises:
        ConfigError: nothing is certified here, so there is nothing to watch.
        CertificateError: the state is damaged, or of another certificate.
    """

    def __init__(self, predictor: RoutedPredictor, state: str | Path, *, shadow_share: float = 0.02) -> None:
        certificate = predictor.certificate
        if certificate is None:
            raise ConfigError(f"there is nothing to audit: {predictor.reason}.")
        self.predictor, self._state = predictor, Path(state)
        self.runtime, self.version, self.precision = predictor.runtime, predictor.version, predictor.precision
        self.audit = open_audit(certificate, self._state, shadow_share=shadow_share)
        self._stop_if_alarmed()

    def run(self, inputs: Arrays, ids: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Logits (rows, classes).

        Args:
            inputs: see `Predictor.run`.
            ids: of the rows, which decide what is compared; None takes their content.
        """
        routed = self.predictor.route(inputs)
        if not self.audit.is_alarmed:
            names = _contents(inputs) if ids is None else ids
            chosen = [row for row, name in enumerate(names) if self.audit.wants_shadow(name)]
            if chosen:
                self._compare(inputs, routed, chosen)
        return {"logits": np.stack([one.output for one in routed])}

    def kernels(self) -> Mapping[str, str]:
        """Those of the predictor."""
        return self.predictor.kernels()

    def _compare(self, inputs: Arrays, routed: Sequence[Routed], chosen: Sequence[int]) -> None:
        full = self.predictor.paths.full.name
        cheap = [row for row in chosen if routed[row].path != full]
        right = {}
        if cheap:
            found = self.predictor.whole.run({name: array[cheap] for name, array in inputs.items()})["logits"]
            right = dict(zip(cheap, found.argmax(-1).tolist(), strict=True))
        for row in chosen:
            self.audit.observe(float(row in right and int(routed[row].output.argmax()) != right[row]))
        self.audit.save(self._state)
        self._stop_if_alarmed()

    def _stop_if_alarmed(self) -> None:
        if self.audit.is_alarmed and self.predictor.rule is not None:
            self.predictor.stop(alarm_of(self.audit))
            _LOG.warning("%s", self.predictor.reason)


def open_audit(certificate: Certificate, state: Path | None, *, shadow_share: float, salt: str = "") -> Audit:
    """The audit of a certificate: that of its file if it is there, else a new one.

    Args:
        certificate: whose promise is watched.
        state: file of the audit; None for none.
        shadow_share, salt: of a new one, see `AuditConfig`.

    Raises:
        ConfigError: the certificate promises how good answers are, which a difference does not tell.
        CertificateError: the state is damaged, or of another certificate.
    """
    targets = [parse_target(proof.target) for proof in certificate.proofs]
    if any(target.kind in ("bounded", "drop") for target in targets):
        raise ConfigError(
            f"an audit watches answers that differ, and this certificate promises {targets[0].name}, how good they "
            "are: two summaries of a document may differ and be as good. Leave the audit out."
        )
    seal = str(certificate.to_dict()[SEAL])
    if state is not None and state.exists():
        return Audit.load(state, certificate=seal)
    return Audit(AuditConfig(alpha=watched(certificate), certificate=seal, shadow_share=shadow_share, salt=salt))


def alarm_of(audit: Audit) -> str:
    """What an audit that has alarmed says."""
    return (
        f"the audit found {audit.mean:.1%} of {audit.samples:,} answers changed where {audit.config.alpha:.1%} is "
        "allowed, so every input takes the full path"
    )


def watched(certificate: Certificate) -> float:
    """The share of answers that may differ from the full path's before an audit alarms."""
    bound = max(parse_target(proof.target).alpha for proof in certificate.proofs)
    return max(bound, certificate.measured.get("disagreement", 0.0))


def _contents(inputs: Arrays) -> list[str]:
    """A hash of each row."""
    count = len(next(iter(inputs.values())))
    digests = [hashlib.sha256() for _ in range(count)]
    for name in sorted(inputs):
        for row, digest in enumerate(digests):
            digest.update(np.ascontiguousarray(inputs[name][row]).tobytes())
    return [digest.hexdigest() for digest in digests]
