"""Conversion from end to end: profile the heads, assign their classes, fit scorers, distil, judge, write."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion.assign import Classes, HeadClass, assign, assign_within
from trilevel.conversion.converted import save_converted
from trilevel.conversion.fit import DistillBatches, Trained, distillation, train_only
from trilevel.conversion.judge import Costs, Quality, compare, costs_at, head_costs
from trilevel.conversion.multilevel import convertible, with_classes
from trilevel.conversion.profile import Forward, HeadProfile, Progress, fit_scorers, profile_heads
from trilevel.conversion.report import head_map, report_of
from trilevel.conversion.sequences import split_off
from trilevel.conversion.source import Source
from trilevel.errors import ConfigError, InputError, QualityError
from trilevel.model.encoder import Encoder
from trilevel.training.config import TrainConfig
from trilevel.training.dropout import without_dropout
from trilevel.training.loop import fit


def _levels() -> Levels:
    return Levels(window=257, region_size=64, num_global_tokens=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """How an encoder is converted.

    Args:
        levels: sizes of the levels, and the ratio of the heads over the whole model unless `max_error` is given.
        num_dense_heads: heads of the whole model that keep seeing everything.
        max_error: in place of the ratio: the cheapest classes whose profiled errors, summed over the heads and divided
            by the number of layers, stay within it; a head that fits in nowhere stays dense.
        num_profiled: sequences that the heads are profiled on.
        num_held_out: further sequences that quality is measured on.
        steps: of distillation; 0 leaves it out.
        batch_size: sequences a step.
        trained: which weights distillation trains.
        learning_rate: highest rate; None is 1e-4 for all weights and 1e-3 for few.
        max_loss: refuse to write a model whose vectors are further from the original's: 1 - mean cosine.
        lengths: tokens at which costs are predicted and measured; images have one length, their own.
        seed: of the order of batches.
    """

    levels: Levels = field(default_factory=_levels)
    num_dense_heads: int = 0
    max_error: float | None = None
    num_profiled: int = 64
    num_held_out: int = 32
    steps: int = 300
    batch_size: int = 8
    trained: Trained = "all"
    learning_rate: float | None = None
    max_loss: float | None = None
    lengths: tuple[int, ...] = (512, 2_048)
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("num_profiled", "num_held_out", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"ConvertConfig: {name}={getattr(self, name)} must be >= 1.")
        if self.steps < 0 or not (self.learning_rate is None or self.learning_rate > 0):
            raise ConfigError(
                f"ConvertConfig: steps={self.steps} must be >= 0 and learning_rate={self.learning_rate} > 0."
            )
        if self.levels.dense_below is not None:
            raise ConfigError(
                "ConvertConfig: levels.dense_below hides what conversion does to short inputs; set it on the converted "
                "model if you want it."
            )
        if self.max_error is not None and (not self.max_error >= 0 or self.num_dense_heads):
            raise ConfigError(
                f"ConvertConfig: max_error={self.max_error} must be >= 0, and chooses the dense heads itself: leave "
                f"num_dense_heads={self.num_dense_heads} at 0."
            )
        if self.max_loss is not None and not 0 <= self.max_loss <= 2:
            raise ConfigError(f"ConvertConfig: max_loss={self.max_loss} must lie in [0, 2]: 1 - mean cosine.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion made.

    Args:
        encoder: the converted one, in evaluation mode.
        classes: (converted blocks, heads), `HeadClass` values by the original's place of the head.
        profile: of the heads.
        before, after: quality without and with distillation.
        costs: of dense and converted encoder at each length.
        report: all of it as JSON types.
    """

    encoder: Encoder
    classes: Classes
    profile: HeadProfile
    before: Quality
    after: Quality
    costs: list[Costs]
    report: dict[str, Any]


def convert(
    source: Source,
    sequences: Sequence[Tensor],
    config: ConvertConfig,
    *,
    out: Path | None = None,
    progress: Progress = lambda _what, _done: None,
    show_progress: bool = True,
) -> Conversion:
    """Convert a dense encoder; with `out` the result is written there, whole or not at all.

    An interrupted distillation goes on where it stopped when the same call is made again; with any other source,
    sequences or configuration it starts anew. Its state lies in `.NAME.work` beside `out` until the result is written.

    Args:
        source: from `load_source`.
        sequences: what the encoder reads, each without the batch axis: token ids (tokens,), or images.
        config: how.
        out: folder to write.
        progress: told what is done in the stages without a bar of their own.
        show_progress: of the distillation.

    Raises:
        InputError: too few sequences.
        ConfigError: nothing to convert.
        QualityError: the result is further from the original than `max_loss` allows; nothing is written.
        TrainingInterrupted: the user stopped; the distillation can go on.
    """
    dense = source.encoder
    blocks = _blocks(source)
    rest, held_out = split_off(sequences, config.num_held_out)
    if len(rest) < config.batch_size:
        raise InputError(f"{len(rest)} sequences remain to learn from; {config.batch_size} or more are needed.")
    profiled = rest[:: max(1, len(rest) // config.num_profiled)][: config.num_profiled]

    scorers = fit_scorers(blocks, dense, profiled, config.levels, progress=progress)
    profile = profile_heads(blocks, dense, profiled, config.levels, scorers, progress=progress)
    # an image is never longer or shorter
    lengths = config.lengths if dense.config.patches is None else (source.trained_tokens,)
    classes = _assigned(profile, config, len(blocks), lengths)
    scorers = _own_scorers(scorers, blocks, dense, profiled, config.levels, classes, progress)
    encoder = with_classes(dense, classes, config.levels, scorers)
    before = compare(dense, encoder.eval(), held_out, source.sentence)
    work = None if out is None else out.resolve().with_name(f".{out.resolve().name}.work")
    if config.steps:
        _distil(source, encoder, rest, config, work, show_progress=show_progress)
    after = compare(dense, encoder.eval(), held_out, source.sentence) if config.steps else before
    costs = [costs_at(dense, encoder, tokens, progress) for tokens in lengths]
    report = report_of(source, config.levels, classes, profile, before, after, costs, _settings(config))
    if config.max_loss is not None and after.loss > config.max_loss:
        raise QualityError(
            f"the converted model's vectors are {after.loss:.4f} from the original's (1 - mean cosine) and max_loss="
            f"{config.max_loss} is allowed; nothing is written. Use a wider window, more steps or dense heads."
        )
    if out is not None:
        save_converted(out, source, encoder, report, head_map(classes, profile))
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return Conversion(
        encoder=encoder, classes=classes, profile=profile, before=before, after=after, costs=costs, report=report
    )


def _blocks(source: Source) -> list[nn.Module]:
    found = [source.encoder.stack.blocks[index] for index in convertible(source.encoder)]
    if not found:
        raise ConfigError(f"{source.name} has no dense attention to convert: every block has levels already.")
    return found


def _assigned(profile: HeadProfile, config: ConvertConfig, num_blocks: int, lengths: Sequence[int]) -> Classes:
    if config.max_error is None:
        return assign(profile.error, config.levels.ratio, num_dense_heads=config.num_dense_heads)
    costs = head_costs(config.levels, tokens=max(lengths, default=2_048))
    return assign_within(profile.error, costs, bound=config.max_error * num_blocks)


def _own_scorers(
    scorers: list[Tensor],
    blocks: Sequence[nn.Module],
    forward: Forward,
    sequences: Sequence[Tensor],
    levels: Levels,
    classes: Classes,
    progress: Progress,
) -> list[Tensor]:
    """Scorers fitted to the heads that became global; where there is none it is not used."""
    heads = [np.flatnonzero(own == HeadClass.GLOBAL).tolist() for own in classes]
    if not any(heads):
        return scorers
    return fit_scorers(blocks, forward, sequences, levels, heads=heads, progress=progress)


def _distil(
    source: Source,
    encoder: Encoder,
    sequences: Sequence[Tensor],
    config: ConvertConfig,
    work: Path | None,
    *,
    show_progress: bool,
) -> None:
    padding = 0 if source.padding_id is None else source.padding_id
    batches = DistillBatches(sequences=sequences, batch_size=config.batch_size, padding_id=padding, seed=config.seed)
    train_only(encoder, config.trained)
    train = TrainConfig(
        steps=config.steps,
        learning_rate=config.learning_rate or (1e-4 if config.trained == "all" else 1e-3),
        warmup_steps=min(20, config.steps),
        checkpoint_every=50,
        seed=config.seed,
    )
    objective = distillation(source.encoder, encoder, source.sentence)
    with tempfile.TemporaryDirectory() as temporary, without_dropout(encoder):
        folder = Path(temporary) if work is None else _same_work(work, source, sequences, config)
        fit(encoder, batches, objective, config=train, out_dir=folder, show_progress=show_progress)
    encoder.requires_grad_(True)


def _same_work(work: Path, source: Source, sequences: Sequence[Tensor], config: ConvertConfig) -> Path:
    """The folder of the state, emptied if it belongs to another conversion."""
    digest = hashlib.sha256(json.dumps([source.sha256, _settings(config)], sort_keys=True).encode())
    for sequence in sequences:
        digest.update(sequence.numpy().tobytes())
    mark = work / "conversion.sha256"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != digest.hexdigest():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        mark.write_text(digest.hexdigest(), encoding="utf-8")
    return work


def _settings(config: ConvertConfig) -> dict[str, Any]:
    values = asdict(replace(config, levels=replace(config.levels, ratio=LevelRatio(1, 1, 1))))
    values["levels"] = asdict(config.levels) | {"ratio": list(config.levels.ratio.shares)}
    values["lengths"] = list(config.lengths)
    return values
