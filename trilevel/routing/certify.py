"""The test behind a certificate: from the safest setting to cheaper ones, until one cannot be proved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.errors import CertificateError, ConfigError, InputError
from trilevel.routing.evidence import betting_p_value, binomial_p_value, samples_needed
from trilevel.routing.targets import Target

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was seen of a target.

    Attributes:
        target: its name.
        units: groups that were looked at, each counted once.
        mean: of their losses, on the scale of the target's bound.
        errors: how many lost; None where losses are no plain 0 or 1.
        p_value: of "the mean is the bound or more".
    """

    target: str
    units: int
    mean: float
    errors: int | None
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """The cheapest setting that was proved: its number, and the proof of each target."""

    setting: int
    proofs: tuple[Proof, ...]


def prove(target: Target, losses: Floats, counts: npt.NDArray[np.bool_], groups: npt.NDArray[Any]) -> Proof:
    """Test one target on held-out losses (samples,).

    What is exchangeable are groups, not samples: each group is one unit and its loss the mean of its members. Units
    that are all 0 or 1 get the exact binomial test, others the betting test.

    Args:
        target: see there.
        losses: in [0, 1].
        counts: (samples,), which of them the target is about.
        groups: (samples,), equal where samples depend on each other.
    """
    _, inverse = np.unique(groups[counts], return_inverse=True)
    members = np.bincount(inverse)
    units = np.bincount(inverse, weights=losses[counts]) / np.maximum(members, 1)
    is_plain = bool(np.isin(units, (0.0, 1.0)).all())
    errors = int(units.sum()) if is_plain else None
    if errors is not None:
        p_value = binomial_p_value(errors, len(units), target.bound)
    else:
        p_value = betting_p_value(units, target.bound)
    mean = float(units.mean()) if len(units) else float("nan")
    return Proof(target=target.name, units=len(units), mean=mean, errors=errors, p_value=p_value)


def certify(
    targets: Sequence[Target],
    losses: Sequence[tuple[Floats, npt.NDArray[np.bool_]]],
    *,
    delta: float,
    groups: npt.NDArray[Any],
) -> Certified:
    """The last setting, from safe to cheap, for which all targets are proved.

    Settings are tried in their order, each at the full delta, and the first that fails ends it (fixed-sequence testing:
    Bauer 1991; Angelopoulos et al. 2021, arXiv 2110.01052). The chance that a setting comes out whose risk is too high
    is at most delta, if the order was fixed without these samples and groups are exchangeable with those to come.

    Args:
        targets: all must hold.
        losses: of each target, (samples, settings) and which samples count, see `targets.losses_of`.
        delta: chance of an error, such as 0.05.
        groups: (samples,), see `prove`.

    Raises:
        CertificateError: the safest setting is not proved; it says how many samples are missing.
        ConfigError: no target or no setting, or delta is out of range.
    """
    if not targets or not 0 < delta < 1 or not losses[0][0].shape[1]:
        raise ConfigError(f"delta={delta} must lie between 0 and 1, with a target and a setting at least.")
    if len({matrix.shape for matrix, _ in losses}) != 1 or len(losses) != len(targets):
        raise InputError("every target needs losses of the same samples and settings.")
    found: Certified | None = None
    for setting in range(losses[0][0].shape[1]):
        proofs = tuple(
            prove(target, matrix[:, setting], counts, groups)
            for target, (matrix, counts) in zip(targets, losses, strict=True)
        )
        if any(proof.p_value > delta for proof in proofs):
            if found is None:
                raise CertificateError(_refusal(targets, proofs, delta))
            break
        found = Certified(setting=setting, proofs=proofs)
    assert found is not None
    return found


def samples_missing(target: Target, proof: Proof, delta: float) -> int:
    """How many more units would prove a target if none of them lost anything; 0 if it is proved.

    Exact for losses of 0 and 1. For others the fewest with which units of these losses, all at the mean, could be
    proved; with their scatter it takes more.
    """
    if proof.p_value <= delta:
        return 0
    # with losses between 0 and 1 the mean loss of all units is that of so many whole errors
    errors = proof.errors if proof.errors is not None else int(np.ceil(proof.units * proof.mean))
    return max(1, samples_needed(errors, target.bound, delta) - proof.units)


def _refusal(targets: Sequence[Target], proofs: Sequence[Proof], delta: float) -> str:
    said = []
    for target, proof in zip(targets, proofs, strict=True):
        missing = samples_missing(target, proof, delta)
        if missing:
            seen = "lost on average" if proof.errors is None else f"({proof.errors} lost) of"
            mean = f"{proof.mean:.4f} " if proof.errors is None else ""
            least = "at least " if proof.errors is None else ""
            said.append(
                f"{target.name} needs {least}{missing:,} more samples that lose nothing; {mean}{seen} {proof.units:,} "
                "were given"
            )
    return (
        f"not certified at a confidence of {1 - delta:g}: {'; '.join(said)}. Give more held-out samples, or allow a "
        "larger loss or a lower confidence."
    )
