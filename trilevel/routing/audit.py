"""The audit of served traffic: an alarm once the risk is above what was certified, and what the risk is."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from trilevel.compression.written import read_json, write_json
from trilevel.errors import CertificateError, ConfigError, InputError
from trilevel.routing.certificate import SEAL, digest

Floats = npt.NDArray[np.floating[Any]]
FORMAT, VERSION = "trilevel-audit", 1
_NUM_STAKES = 8
# candidates for the risk on either side of alpha
_NUM_CANDIDATES = 64
# bets against a candidate for the risk: that it is too low, by this share of it, and too high, by this share
_TOO_LOW, _TOO_HIGH = np.geomspace(0.02, 20, 6)[:, None], np.geomspace(0.02, 0.9, 6)[:, None]
_NEW = "Start a new audit (Audit) where the old one's evidence may be lost."


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """What is audited.

    Args:
        alpha: the risk that was certified, `Target.bound` of the target.
        certificate: SHA-256 of the certificate, such as its seal, so that evidence never counts for another.
        delta: chance that an alarm is ever false; the default is low because an alarm costs all speed.
        shadow_share: share of the requests that also take the full path.
        salt: makes which requests these are; keep it secret where clients choose the ids of their requests.

    Raises:
        ConfigError: a value is out of range or missing.
    """

    alpha: float
    certificate: str
    delta: float = 0.01
    shadow_share: float = 0.02
    salt: str = ""

    def __post_init__(self) -> None:
        """Check every value."""
        _check_share("alpha", self.alpha)
        _check_share("delta", self.delta)
        if not 0 < self.shadow_share <= 1:
            raise ConfigError(f"AuditConfig: shadow_share={self.shadow_share} must lie in (0, 1], as in 0.02.")
        if not self.certificate:
            raise ConfigError("AuditConfig: certificate is empty; give the hash of the certificate that is audited.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A test that `Audit.reset` ended: why, after how many samples of which mean loss, and whether it had alarmed."""

    reason: str
    samples: int
    mean: float
    alarmed: bool


@final
class Audit:
    """Tests all along, on a random share of the traffic, whether the risk is still at most alpha.

    The risk is that of all traffic: a sampled request that took the full path has a loss of 0 and must be observed as
    such. Without labels the loss is whether the cheap answer differs from the full path's, which bounds the harm.

    The alarm is a gambler who bets that losses are above alpha, with stakes for risks of little above alpha to half of
    all. With a risk of at most alpha at all times the capital ever reaches 1 / delta with a chance of at most delta,
    whenever one looks (Ville 1939). Part of the capital is set in after each sample, so that a shift is found after
    long calm as well (a mixture over its start; after Shin, Ramdas and Rinaldo 2024, arXiv 2203.03532, whose detectors
    have no bound over all time; the amounts are this project's own choice). The alarm stays until `reset`, and what is
    observed meanwhile is not counted, because everything should take the full path then. Each test between resets has
    a delta of its own.

    Losses that are lost between the last `save` and a crash cost evidence, and make no alarm false if crashes do not
    depend on losses. Not thread-safe; one observation costs some 50 microseconds.

    >>> audit = Audit(AuditConfig(alpha=0.01, certificate="1f" * 32))
    >>> [audit.observe(loss) for loss in (0.0, 1.0, 1.0, 0.0)]
    [False, False, True, True]
    """

    def __init__(self, config: AuditConfig) -> None:
        self.config = config
        self.history: tuple[Ended, ...] = ()
        self._stakes = _stakes(config.alpha)
        self._candidates = _candidates(config.alpha)
        self._clear()

    def _clear(self) -> None:
        self.samples = 0
        self.is_alarmed = False
        self._sum = 0.0
        self._wealth = np.full(_NUM_STAKES, _log_added(0))
        self._too_low = np.zeros((len(_TOO_LOW), len(self._candidates)))
        self._too_high = np.zeros((len(_TOO_HIGH), len(self._candidates)))

    @property
    def mean(self) -> float:
        """Of the losses since the last reset; 0 before the first."""
        return self._sum / max(1, self.samples)

    @property
    def log_capital(self) -> float:
        """Natural logarithm of the gambler's capital, which began with 0; the alarm is at -log(delta)."""
        return float(_log_capital(self._wealth, self.samples))

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the risk that hold at all times together, but for a chance of delta, if the risk is constant.

        Each candidate is bet against from both sides, and falls at a mean capital of 2 / delta over the bets of a side;
        this is monotone in the candidate, and rounded outwards (hedged betting as of Waudby-Smith and Ramdas 2024,
        arXiv 2010.09686, with fixed bets). Of a risk that moves it says nothing but where the mean loss has been.
        """
        least = math.log(2 / self.config.delta)
        low = self._candidates[_log_mean(self._too_low) >= least].max(initial=0.0)
        high = self._candidates[_log_mean(self._too_high) >= least].min(initial=1.0)
        return float(low), float(high)

    def wants_shadow(self, request_id: str) -> bool:
        """Whether a request is sampled; the same for the same id and salt on every machine."""
        text = f"{self.config.salt}\0{request_id}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8]) < self.config.shadow_share * 2**64

    def observe(self, loss: float) -> bool:
        """Count the loss of a sampled request; whether the alarm is on.

        Raises:
            InputError: the loss is not in [0, 1].
        """
        if not 0 <= loss <= 1:
            raise InputError(f"Audit: a loss must lie in [0, 1], got {loss}. Give 0.0 for what took the full path.")
        if self.is_alarmed:
            return True
        low, high = self._candidates, 1 - self._candidates
        self._too_low += np.log1p(np.minimum(0.5, _TOO_LOW * low / high) * (loss / low - 1))
        self._too_high += np.log1p(_TOO_HIGH * ((1 - loss) / high - 1))
        self._sum += float(loss)
        self.samples += 1
        self._wealth = _grown(self._wealth, np.float64(loss), self.config.alpha, self._stakes, self.samples)
        self.is_alarmed = self.log_capital >= -math.log(self.config.delta)
        return self.is_alarmed

    def reset(self, reason: str) -> None:
        """Begin a new test with the full delta; the old one is kept in `history`.

        Raises:
            ConfigError: no reason is given.
        """
        if not reason.strip():
            raise ConfigError("Audit.reset: reason is empty; say what was done about the risk.")
        ended = Ended(reason=reason, samples=self.samples, mean=self.mean, alarmed=self.is_alarmed)
        self.history += (ended,)
        self._clear()

    def to_dict(self) -> dict[str, Any]:
        """All of its state as JSON types, sealed against damage."""
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, "config": dataclasses.asdict(self.config)}
        values |= {"history": [dataclasses.asdict(one) for one in self.history]}
        values |= {name: getattr(self, attribute) for name, attribute in _NUMBERS.items()}
        values |= {name: getattr(self, attribute).tolist() for name, attribute in _ARRAYS.items()}
        return values | {SEAL: digest(values)}

    def save(self, path: str | Path) -> None:
        """Write the state, in place of an older one only when it is whole."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path, *, certificate: str) -> Audit:
        """The audit that `save` wrote, to go on as if it had never stopped.

        Raises:
            CertificateError: the state is missing, damaged, of another version, or of another certificate.
        """
        values = read_json(Path(path))
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise CertificateError(f"{path}: no {FORMAT} of version {VERSION} can be read there. {_NEW}")
        try:
            found = cls._from_dict(values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CertificateError(f"{path}: the state of the audit is damaged ({error}). {_NEW}") from error
        if found.config.certificate != certificate:
            raise CertificateError(
                f"{path}: the state is of the certificate {found.config.certificate[:12]} and not of "
                f"{certificate[:12]}, so its evidence does not count. {_NEW}"
            )
        return found

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> Audit:
        own = {name: value for name, value in values.items() if name != SEAL}
        if values.get(SEAL) != digest(own):
            raise ValueError("it was changed after it was written")
        found = cls(AuditConfig(**own["config"]))
        found.history = tuple(Ended(**one) for one in own["history"])
        for name, attribute in _NUMBERS.items():
            if type(own[name]) is not type(getattr(found, attribute)):
                raise TypeError(f"{name}={own[name]!r}")
            setattr(found, attribute, own[name])
        for name, attribute in _ARRAYS.items():
            array = np.array(own[name], np.float64)
            if array.shape != getattr(found, attribute).shape:
                raise ValueError(f"{name} has the shape {array.shape}")
            setattr(found, attribute, array)
        return found


_NUMBERS = {"samples": "samples", "is_alarmed": "is_alarmed", "sum": "_sum"}
_ARRAYS = {"wealth": "_wealth", "too_low": "_too_low", "too_high": "_too_high"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerRow:
    """What an audit does at a risk.

    Attributes:
        risk: of traffic, after a shift.
        alarmed: share of the runs that alarmed.
        median_samples: from the shift to the alarm, of these; None if none did. Requests are 1 / `shadow_share` of it.
    """

    risk: float
    alarmed: float
    median_samples: float | None


def power(
    alpha: float,
    shifts: Sequence[float],
    *,
    delta: float = 0.01,
    samples: int = 10_000,
    calm: int = 0,
    runs: int = 200,
    seed: int = 0,
) -> tuple[PowerRow, ...]:
    """How often and how soon an audit alarms, by simulation of losses of 0 and 1.

    Args:
        alpha: the certified risk.
        shifts: risks; one of alpha or less shows false alarms.
        delta: see `AuditConfig`.
        samples: sampled requests after the shift.
        calm: sampled requests at a risk of alpha / 2 before it; runs that alarm in them are left out.
        runs: simulated at each risk.
        seed: of the simulation.

    Raises:
        ConfigError: a value is out of range.
    """
    _check_share("alpha", alpha)
    _check_share("delta", delta)
    if samples < 1 or runs < 1 or calm < 0 or not all(0 <= risk <= 1 for risk in shifts):
        raise ConfigError(f"power: samples={samples}, runs={runs}, calm={calm} or a risk of {shifts} is out of range.")
    rows = []
    for number, risk in enumerate(shifts):
        first = _first_alarms(alpha, risk, delta, samples, calm, runs, np.random.default_rng((seed, number)))
        delays = first[first > calm] - calm
        found = delays[np.isfinite(delays)]
        median = float(np.median(found)) if len(found) else None
        rows.append(PowerRow(risk=risk, alarmed=len(found) / max(1, len(delays)), median_samples=median))
    return tuple(rows)


def _first_alarms(
    alpha: float, risk: float, delta: float, samples: int, calm: int, runs: int, rng: np.random.Generator
) -> Floats:
    """The sample at which each run alarms (runs,), infinite where none does."""
    first = np.full(runs, np.inf)
    wealth, stakes = np.full((runs, _NUM_STAKES), _log_added(0)), _stakes(alpha)
    for count in range(1, calm + samples + 1):
        losses = (rng.random((runs, 1)) < (risk if count > calm else alpha / 2)).astype(np.float64)
        wealth = _grown(wealth, losses, alpha, stakes, count)
        first[np.isinf(first) & (_log_capital(wealth, count) >= -math.log(delta))] = count
        if np.isfinite(first).all():
            break
    return first


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"audit: {name}={value} must lie between 0 and 1.")


def _stakes(alpha: float) -> Floats:
    """Shares of the capital that a loss of 0 takes (stakes,); a loss of 1 multiplies by about stake / alpha."""
    return np.asarray(np.geomspace(min(0.01, alpha / 2), 0.5, _NUM_STAKES))


def _candidates(alpha: float) -> Floats:
    """Rising, within (0, 1): evenly spread logarithms of the distance from alpha, and from 0 far below it."""
    near = alpha * (1 - np.geomspace(1e-3, 0.5, _NUM_CANDIDATES // 2))
    far = alpha * np.geomspace(0.005, 0.5, _NUM_CANDIDATES // 2, endpoint=False)
    away = np.geomspace(min(1e-3, alpha / 20), 1, _NUM_CANDIDATES, endpoint=False)
    return np.concatenate([far, near[::-1], [alpha], alpha + (1 - alpha) * away])


def _cash(count: int) -> float:
    """Capital that is not yet at stake before sample `count` + 1 is seen, of 1 to begin with."""
    return 1 / (1 + math.log1p(count))


def _log_added(count: int) -> float:
    """Logarithm of what each stake gets after `count` samples: the difference of `_cash`, without cancellation."""
    return math.log(math.log1p(1 / (count + 1)) * _cash(count) * _cash(count + 1) / _NUM_STAKES)


def _grown(wealth: Floats, losses: Any, alpha: float, stakes: Floats, count: int) -> Floats:
    """Log capital (..., stakes) after sample `count` with these losses (..., 1), and with what is added for the next.

    Under a mean loss of at most alpha its sum and the cash are a supermartingale that begins with 1.
    """
    return np.asarray(np.logaddexp(wealth + np.log1p(stakes * (losses / alpha - 1)), _log_added(count)))


def _log_mean(wealth: Floats) -> Floats:
    """Logarithm of the mean capital over bets (bets, candidates)."""
    return np.asarray(np.logaddexp.reduce(wealth, axis=0) - math.log(len(wealth)))


def _log_capital(wealth: Floats, count: int) -> Any:
    return np.logaddexp(np.logaddexp.reduce(wealth, axis=-1), math.log(_cash(count + 1)))
