"""Which layers a model can afford to quantize: each one alone, and the ones to leave float for a given loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypedDict

from torch import nn

from trilevel.compression.quantize import QuantizeConfig, Run, call, prepare, quantized_bytes, replaced
from trilevel.errors import ConfigError


class LayerLoss(TypedDict):
    """One row of the table: what a layer costs when it alone is quantized.

    `loss` is the quality of the float model less that with this layer quantized; `bytes_saved` what its weights become
    smaller by.
    """

    name: str
    kind: str
    loss: float
    bytes_saved: int


def sensitivity(
    model: nn.Module,
    config: QuantizeConfig,
    batches: Iterable[Any],
    quality: Callable[[nn.Module], float],
    run: Run = call,
) -> list[LayerLoss]:
    """Quantize each layer alone, on one calibration, and measure; the most harmful first.

    Args:
        model: a float model, left alone.
        config: how layers are quantized; those it skips are not in the table.
        batches: calibration data, as for `quantize`.
        quality: of a model, higher is better; called once for the float model and once a layer.
        run: how a batch is run through the model.

    Raises:
        ConfigError: as `quantize` does.
    """
    draft = prepare(model, config, batches, run)
    whole = quality(draft.model)
    rows: list[LayerLoss] = []
    for name, layer in draft.made.items():
        original = draft.model.get_submodule(name)
        alone = replaced(draft.model, {id(original): layer.train(original.training)})
        found = quality(alone)
        replaced(alone, {id(layer): original})
        rows.append(
            LayerLoss(
                name=name,
                kind="embedding" if isinstance(layer, nn.Embedding) else "linear",
                loss=whole - found,
                bytes_saved=quantized_bytes(original) - quantized_bytes(layer),
            )
        )
    return sorted(rows, key=lambda row: -row["loss"])


def choose_skips(rows: Sequence[LayerLoss], budget: float) -> tuple[str, ...]:
    """Layers to leave float, so that the losses of the others add up to at most `budget`; for `QuantizeConfig.skip`.

    Those with the most loss for a byte saved go first; a layer that fits in the end after all is quantized. Losses of
    layers add up roughly only: measure the model that results.

    Args:
        rows: of `sensitivity`.
        budget: in the unit of its quality.

    Raises:
        ConfigError: the budget is negative.

    >>> row = dict(kind="linear", bytes_saved=100)
    >>> choose_skips([LayerLoss(name="up", loss=0.03, **row), LayerLoss(name="down", loss=0.01, **row)], 0.02)
    ('up',)
    """
    if budget < 0:
        raise ConfigError(f"budget={budget} must not be negative.")
    losses = {row["name"]: max(0.0, row["loss"]) for row in rows}
    order = sorted(rows, key=lambda row: -losses[row["name"]] / max(1, row["bytes_saved"]))
    skipped: list[str] = []
    for row in order:
        if _total(losses, skipped) <= budget:
            break
        skipped.append(row["name"])
    for name in list(skipped):
        others = [other for other in skipped if other != name]
        if _total(losses, others) <= budget:
            skipped = others
    return tuple(skipped)


def _total(losses: dict[str, float], skipped: Sequence[str]) -> float:
    return sum(loss for name, loss in losses.items() if name not in skipped)
