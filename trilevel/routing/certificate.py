"""A certificate: which setting was proved, of what, on which data and where; sealed against edits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trilevel.errors import CertificateError
from trilevel.routing.certify import Proof

FORMAT, VERSION = "trilevel-certificate", 1
SEAL = "seal"
ASSUMES = (
    "Groups of samples to come are exchangeable with those of the calibration: drawn alike, in any order. Nothing is "
    "promised of data that drifts, or of any single class or input unless a target names it."
)
_AGAIN = "Certify again (trilevel certify)."


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What answers depend on beside model and data.

    Attributes:
        runtime: its name.
        version: of the runtime.
        isa: the widest instruction set that products use, such as avx2, avx512_vnni or amx.
        precision: of what is not quantized.
    """

    runtime: str
    version: str
    isa: str
    precision: str

    def difference(self, other: Platform) -> str:
        """What differs from another, in words; empty if nothing does."""
        pairs = [
            (name, getattr(self, name), getattr(other, name)) for name in ("runtime", "version", "isa", "precision")
        ]
        return ", ".join(f"{name} {own} and here {theirs}" for name, own, theirs in pairs if own != theirs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A promise with its proof; `to_dict` seals it.

    Attributes:
        proofs: of each target.
        delta: the chance that the promise is wrong.
        setting: the thresholds, see `router.thresholds`.
        hashes: SHA-256 by name: `model` (all graphs), `router`, `data`, `settings` (the ordered family).
        platform: where it was made.
        seed: of the split.
        tries: how often this data was asked for a proof, this time included; see `share_of_delta`.
        created: date, ISO 8601.
        measured: what else was seen on the calibration data, for people.
    """

    proofs: tuple[Proof, ...]
    delta: float
    setting: Mapping[str, float]
    hashes: Mapping[str, str]
    platform: Platform
    seed: int
    tries: int
    created: str
    measured: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON types, with the seal."""
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "assumes": ASSUMES}
        values |= dataclasses.asdict(self)
        values["proofs"] = [dataclasses.asdict(proof) for proof in self.proofs]
        values |= {name: dict(values[name]) for name in ("setting", "hashes", "measured")}
        return values | {SEAL: digest(values)}

    @classmethod
    def from_dict(cls, values: Any) -> Certificate:
        """What `to_dict` made.

        Raises:
            CertificateError: it is none, of another version, damaged, or was edited.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT or values.get("version") != VERSION:
            raise CertificateError(f"this is no {FORMAT} of version {VERSION}. {_AGAIN}")
        own = {name: value for name, value in values.items() if name != SEAL}
        try:
            is_whole = values.get(SEAL) == digest(own)
        except ValueError:
            # a number that is none
            is_whole = False
        if not is_whole:
            raise CertificateError(f"the certificate was changed after it was made, so it proves nothing. {_AGAIN}")
        try:
            for name in ("format", "version", "assumes"):
                del own[name]
            own["proofs"] = tuple(Proof(**proof) for proof in own["proofs"])
            own["platform"] = Platform(**own["platform"])
            found = cls(**own)
        except (KeyError, TypeError) as error:
            raise CertificateError(f"the certificate is damaged ({error}). {_AGAIN}") from error
        wrong = [name for name, is_right in _right(found) if not is_right]
        if wrong:
            raise CertificateError(f"the certificate is damaged: its {wrong[0]} cannot be right. {_AGAIN}")
        if not found.proofs or any(
            not proof.p_value <= found.delta * share_of_delta(found.tries) for proof in found.proofs
        ):
            raise CertificateError(f"the certificate's own proofs do not reach its confidence. {_AGAIN}")
        return found

    def check(self, hashes: Mapping[str, str]) -> None:
        """Raise `CertificateError` unless these are the hashes of what was certified."""
        wrong = [name for name, value in hashes.items() if self.hashes.get(name) != value]
        if wrong:
            raise CertificateError(f"the certificate is of another {' and '.join(wrong)} than what is here. {_AGAIN}")

    def said(self) -> str:
        """The promise in words."""
        bounds = ", ".join(proof.target for proof in self.proofs)
        units = min(proof.units for proof in self.proofs)
        return (
            f"{bounds} at a confidence of {1 - self.delta:g}, from {units:,} held-out units, on "
            f"{self.platform.runtime} {self.platform.version} ({self.platform.isa}, {self.platform.precision})"
        )


def _right(found: Certificate) -> list[tuple[str, bool]]:
    """Whether each part of a certificate from a file has the types and the range of one."""
    platform = dataclasses.astuple(found.platform)
    return [
        ("thresholds", _is_table(found.setting) and all(map(_is_number, found.setting.values()))),
        ("hashes", _is_table(found.hashes) and all(isinstance(one, str) for one in found.hashes.values())),
        ("measured values", _is_table(found.measured)),
        ("platform", all(isinstance(part, str) for part in platform)),
        ("date", isinstance(found.created, str)),
        ("seed", _is_count(found.seed)),
        ("number of tries", _is_count(found.tries) and found.tries > 0),
        ("delta", _is_number(found.delta) and 0 < found.delta < 1),
        ("proofs", all(map(_is_proof, found.proofs))),
    ]


def _is_proof(proof: Proof) -> bool:
    errors = proof.errors
    return (
        isinstance(proof.target, str)
        and _is_count(proof.units)
        and _is_number(proof.mean)
        and (errors is None or (_is_count(errors) and errors <= proof.units))
        and _is_number(proof.p_value)
        and 0 <= proof.p_value <= 1
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def share_of_delta(tries: int) -> float:
    """Of the chance of being wrong, what the so-manieth question to the same data gets: together they get all of it.

    Most goes to the first, as later ones are made because it was answered with no.

    >>> [round(share_of_delta(tries), 4) for tries in (1, 2, 3)]
    [0.9, 0.09, 0.009]
    """
    return float(0.9 * 0.1 ** (tries - 1))


def digest(values: Any) -> str:
    """SHA-256 of JSON types."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()
