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
_MOST_MISSING = 1 << 24


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

    What is exchangeable are groups, not samples, and the risk is the mean over groups of the mean loss of a group's
    members. Of losses that are 0 or 1 one member of each group is drawn, blindly, and the exact binomial test taken; of
    others each group is its mean, and the betting test taken. Which of the two follows from the target alone.

    Args:
        target: see there.
        losses: in [0, 1].
        counts: (samples,), which of them the target is about.
        groups: (samples,), equal where samples depend on each other.
    """
    return _proof(target, _units(target, losses, counts, groups))


def _units(target: Target, losses: Floats, counts: npt.NDArray[np.bool_], groups: npt.NDArray[Any]) -> Floats:
    """The loss of each group, in the order of the groups' names."""
    rows = np.flatnonzero(counts)
    if target.is_plain:
        drawn = np.random.default_rng(0).permutation(rows)
        _, first = np.unique(groups[drawn], return_index=True)
        return np.asarray(losses[drawn[first]], np.float64)
    _, inverse = np.unique(groups[rows], return_inverse=True)
    return np.asarray(np.bincount(inverse, weights=losses[rows]) / np.maximum(np.bincount(inverse), 1), np.float64)


def _proof(target: Target, units: Floats) -> Proof:
    errors = int(units.sum()) if target.is_plain else None
    if errors is None:
        p_value = betting_p_value(units, target.bound)
    else:
        p_value = binomial_p_value(errors, len(units), target.bound)
    mean = float(units.mean()) if len(units) else 0.0
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
        units = [
            _units(target, matrix[:, setting], counts, groups)
            for target, (matrix, counts) in zip(targets, losses, strict=True)
        ]
        proofs = tuple(_proof(target, own) for target, own in zip(targets, units, strict=True))
        if any(proof.p_value > delta for proof in proofs):
            if found is None:
                raise CertificateError(_refusal(targets, units, delta))
            break
        found = Certified(setting=setting, proofs=proofs)
    assert found is not None
    return found


def samples_missing(target: Target, units: Floats, delta: float) -> int:
    """How many more units would prove a target if none of them lost anything; 0 if it is proved.

    Exact for losses of 0 and 1. Of others it is found by betting on so many more that lose nothing, behind those given.
    """
    proof = _proof(target, units)
    if proof.p_value <= delta:
        return 0
    if proof.errors is not None:
        return samples_needed(proof.errors, target.bound, delta) - proof.units
    low, high = 0, 64
    while not _is_proved_by(target, units, high, delta):
        low, high = high, 2 * high
        if high > _MOST_MISSING:
            return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _is_proved_by(target, units, middle, delta) else (middle, high)
    return high


def _is_proved_by(target: Target, units: Floats, more: int, delta: float) -> bool:
    return _proof(target, np.concatenate([units, np.full(more, target.nothing)])).p_value <= delta


def _refusal(targets: Sequence[Target], units: Sequence[Floats], delta: float) -> str:
    said = []
    for target, own in zip(targets, units, strict=True):
        missing = samples_missing(target, own, delta)
        if missing:
            lost = f"{int(own.sum())} of" if target.is_plain else "some of"
            said.append(
                f"{target.name} needs {missing:,} more samples that lose nothing; {lost} the {len(own):,} given lose"
            )
    return (
        f"not certified at a confidence of {1 - delta:g}: {'; '.join(said)}. Give more held-out samples, or allow a "
        "larger loss or a lower confidence."
    )
