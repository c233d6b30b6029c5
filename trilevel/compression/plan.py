"""What is done to a model, in order, as a value, and the TOML file that says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trilevel.compression.distill import DistillConfig
from trilevel.compression.exits import ExitsConfig
from trilevel.compression.prune import PruneConfig
from trilevel.compression.quantize import QuantizeConfig
from trilevel.errors import ConfigError
from trilevel.model.config import from_mapping
from trilevel.training.config import TrainConfig
from trilevel.training.recipe import read_tables, train_config

Name = Literal["prune", "exits", "distill", "quantize"]
ORDER: tuple[Name, ...] = ("prune", "exits", "distill", "quantize")
"""Rounding comes last: nothing prunes a quantized model, and what is learned before is learned without its noise."""
_NONE = "none"
# these may be None, which TOML has no word for
_OPTIONAL = ("activations", "smooth")


# what a quantized model lost is little, and steps that suit a pruned one lose more
_RATES: dict[Name, float] = {"prune": 3e-4, "exits": 3e-4, "distill": 3e-4, "quantize": 2e-5}


def _train(learning_rate: float = _RATES["prune"]) -> TrainConfig:
    return TrainConfig(
        steps=1, learning_rate=learning_rate, final_fraction=0.0, betas=(0.9, 0.999), checkpoint_every=100
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Training after a stage; none by default.

    Args:
        steps: of the optimizer.
        epochs: passes over the training data in place of steps.
        warmup_fraction: share of the steps in which the rate grows.
        train: the rest; its steps, warm-up and seed are replaced.
    """

    steps: int = 0
    epochs: int | None = None
    warmup_fraction: float = 0.1
    train: TrainConfig = field(default_factory=_train)

    def __post_init__(self) -> None:
        """Check every value."""
        if self.steps < 0 or (self.epochs is not None and self.epochs < 1):
            raise ConfigError(f"Recovery: steps={self.steps} must be >= 0 and epochs={self.epochs} >= 1.")
        if self.steps and self.epochs is not None:
            raise ConfigError(f"Recovery: steps={self.steps} and epochs={self.epochs} are both given; give one.")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"Recovery: warmup_fraction={self.warmup_fraction} must lie in [0, 1).")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is trained."""
        return not self.steps and self.epochs is None

    def config(self, steps_of: Callable[[int], int], seed: int) -> TrainConfig:
        """The training, where `steps_of` says how many steps a number of epochs takes."""
        steps = self.steps if self.epochs is None else max(1, steps_of(self.epochs) // self.train.accumulate)
        return replace(self.train, steps=steps, warmup_steps=int(self.warmup_fraction * steps), seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Which layers stay float, found by quantizing each one alone (`sensitivity`).

    Args:
        skip_budget: quality that the quantized layers may lose together (`choose_skips`); None for no bound.
        max_skips: most layers that stay float; without a budget these are the most harmful ones.
        examples: held-out examples that quality is measured on, for each layer.
    """

    skip_budget: float | None = None
    max_skips: int | None = None
    examples: int = 1_000

    def __post_init__(self) -> None:
        """Check every value."""
        if self.skip_budget is not None and not self.skip_budget >= 0:
            raise ConfigError(f"skip_budget={self.skip_budget} must be >= 0.")
        if (self.max_skips is not None and self.max_skips < 1) or self.examples < 1:
            raise ConfigError(f"max_skips={self.max_skips} and scan_examples={self.examples} must be >= 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of a plan: what it does and the training behind it; `scan` belongs to `quantize`."""

    name: Name
    config: PruneConfig | ExitsConfig | QuantizeConfig | DistillConfig
    recovery: Recovery = Recovery()
    scan: Scan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPlan:
    """Stages in order; what training learns from the teacher; how training data is made batches.

    Args:
        stages: one or more, each name once, in the order prune, exits, distill, quantize.
        losses: for the training of every stage; None trains on labels alone.
        data: options of the application for its training batches.
    """

    stages: tuple[Stage, ...]
    losses: DistillConfig | None = None
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what the stages say of each other."""
        names = [stage.name for stage in self.stages]
        if not names:
            raise ConfigError("the plan does nothing; give it a stage: prune, exits, quantize, or distill with steps.")
        if names != [name for name in ORDER if name in names]:
            raise ConfigError(
                f"the plan has the stages {', '.join(names)}; each once, in the order {', '.join(ORDER)}."
            )
        for stage in self.stages:
            if stage.name in ("exits", "distill") and stage.recovery.is_empty:
                raise ConfigError(
                    f"{stage.name} without training is nothing; give it steps or epochs in {stage.name}.train."
                )
            if isinstance(stage.config, PruneConfig):
                self._check_heads(stage.config)

    def _check_heads(self, pruning: PruneConfig) -> None:
        if self.losses is not None and self.losses.head_weight > 0 and pruning.keep_heads < 1:
            raise ConfigError(
                f"distill: head_weight={self.losses.head_weight} matches heads by their places, and prune: keep_heads="
                f"{pruning.keep_heads} takes some away. Set one to head_weight = 0 or keep_heads = 1.0."
            )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types, by table."""
        values: dict[str, Any] = {stage.name: _plain(stage) for stage in self.stages}
        return values | {"losses": None if self.losses is None else _plain(self.losses), "data": dict(self.data)}


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_plan(path: str | Path) -> CompressionPlan:
    """Read a plan.

    The tables `prune`, `exits`, `quantize` and `distill` hold the fields of `PruneConfig`, `ExitsConfig`,
    `QuantizeConfig` (and `skip_budget`, `max_skips`, `scan_examples`, see `Scan`) and `DistillConfig`. A table
    `train` in each (`[prune.train]`) holds `steps` or `epochs`, `warmup_fraction` and the fields of `TrainConfig`;
    without it nothing is trained. `[distill]` with a `train` is a stage of its own between the other two, and in any
    case says what their training learns from the teacher. `data` is the application's. `"none"` stands for None.

    Raises:
        ConfigError: the file is missing or no TOML, or a table, a key or a value is not understood; it is named.
    """
    path = Path(path)
    tables = read_tables(path, [*ORDER, "data"], option="--plan")
    stages, losses = [], None
    for name in (name for name in ORDER if name in tables):
        table = _table(tables[name], name, path)
        recovery = _recovery(table.pop("train", {}), name, path)
        scan, config = None, None
        if name == "quantize":
            scan = _scan(table, path)
        config = _made(_CONFIGS[name], table, name, path)
        if name == "distill":
            losses = config
        if name != "distill" or not recovery.is_empty:
            stages.append(Stage(name=name, config=config, recovery=recovery, scan=scan))
    data = _table(tables.get("data", {}), "data", path)
    plan: CompressionPlan = _said(lambda: CompressionPlan(stages=tuple(stages), losses=losses, data=data), "", path)
    return plan


_CONFIGS: dict[str, type[Any]] = {
    "prune": PruneConfig,
    "exits": ExitsConfig,
    "quantize": QuantizeConfig,
    "distill": DistillConfig,
}


def _table(given: Any, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {name} must be one table, written [{name}]; each stage stands in a plan once.")
    return dict(given)


def _made(kind: type[Any], table: dict[str, Any], name: str, path: Path) -> Any:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    values |= {key: None for key in _OPTIONAL if values.get(key) == _NONE}
    return _said(lambda: from_mapping(kind, values), f"[{name}] ", path)


def _scan(table: dict[str, Any], path: Path) -> Scan | None:
    """What the table says of the scan, taken out of it; None if nothing asks for one."""
    keys = {"skip_budget": "skip_budget", "max_skips": "max_skips", "scan_examples": "examples"}
    found = {field: table.pop(key) for key, field in keys.items() if key in table}
    scan: Scan = _said(lambda: from_mapping(Scan, found), "[quantize] ", path)
    if scan.skip_budget is None and scan.max_skips is None:
        if found:
            raise ConfigError(f"{path}: [quantize] scan_examples needs skip_budget or max_skips, which ask for a scan.")
        return None
    return scan


def _recovery(given: Any, stage: Name, path: Path) -> Recovery:
    name = f"{stage}.train"
    table = _table(given, name, path)
    own = {key: table.pop(key) for key in ("steps", "epochs", "warmup_fraction") if key in table}
    for key, origin in {"warmup_steps": "warmup_fraction", "seed": "the option --seed"}.items():
        if key in table:
            raise ConfigError(f"{path}: [{name}] {key} follows from {origin}; leave it out.")
    train = _said(lambda: train_config(_train(_RATES[stage]), table, path), f"[{name}] ", path)
    recovery: Recovery = _said(lambda: from_mapping(Recovery, own | {"train": train}), f"[{name}] ", path)
    if table and recovery.is_empty:
        raise ConfigError(f"{path}: [{name}] says how to train but not how long; add steps or epochs.")
    return recovery


def _said(make: Callable[[], Any], where: str, path: Path) -> Any:
    """What `make` gives; an error of it names the file and the table."""
    try:
        return make()
    except ConfigError as error:
        text = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{path}: {where}{text}") from error
    except TypeError as error:
        raise ConfigError(f"{path}: {where}a value has the wrong type ({error}).") from error
