"""What a conversion did, as JSON types and as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trilevel.attention.levels import Levels
from trilevel.conversion.assign import Classes, HeadClass, total_error
from trilevel.conversion.judge import Costs, Quality
from trilevel.conversion.multilevel import convertible
from trilevel.conversion.profile import HeadProfile
from trilevel.conversion.source import Source
from trilevel.errors import require

COLOURS = ("#3b82d6", "#149c78", "#dd6b20", "#8a93a3")
"""Of local, regional, global and dense heads."""


def report_of(
    source: Source,
    levels: Levels,
    classes: Classes,
    profile: HeadProfile,
    before: Quality,
    after: Quality,
    costs: Sequence[Costs],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The report: source, settings, heads, quality before and after distillation, predicted and measured cost."""
    names = [head_class.name.lower() for head_class in HeadClass]
    return {
        "source": {"name": source.name, "family": source.family, "sha256": source.sha256},
        "settings": dict(settings),
        "window": levels.window,
        "profiled": {"sequences": profile.num_sequences, "tokens": profile.num_tokens},
        "heads_of_class": {name: int((classes == place).sum()) for place, name in enumerate(names)},
        "profiled_error": total_error(profile.error, classes) / len(classes),
        "layers": [
            {
                "layer": index,
                "heads": [_head(profile, classes, layer, head, names) for head in range(classes.shape[1])],
            }
            for layer, index in enumerate(convertible(source.encoder))
        ],
        "quality": {"before_distillation": asdict(before), "after": asdict(after), "loss": after.loss},
        "costs": [cost.to_dict() for cost in costs],
    }


def _head(profile: HeadProfile, classes: Classes, layer: int, head: int, names: Sequence[str]) -> dict[str, Any]:
    return {
        "head": head,
        "class": names[classes[layer, head]],
        "error_as": dict(zip(names, profile.error[layer, head].tolist(), strict=False)),
        **{name: float(getattr(profile, name)[layer, head]) for name in ("near", "sink", "far", "entropy")},
    }


def head_map(classes: Classes, profile: HeadProfile) -> bytes:
    """A PNG: a row a layer, a square a head in the colour of its class, darker the more it would lose as a local one.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_of = require("matplotlib.figure", extra="convert")
    patches = require("matplotlib.patches", extra="convert")
    layers, heads = classes.shape
    # room for the legend however few heads there are
    figure = figure_of.Figure(figsize=(max(4.5, 1.6 + 0.42 * heads), 2.0 + 0.42 * layers), layout="constrained")
    axes = figure.add_subplot()
    lost = profile.error[..., HeadClass.LOCAL]
    strength = 0.35 + 0.65 * lost / max(float(lost.max()), np.finfo(float).tiny)
    for layer in range(layers):
        for head in range(heads):
            square = patches.Rectangle(
                (head - 0.45, layer - 0.45), 0.9, 0.9, color=COLOURS[classes[layer, head]], alpha=strength[layer, head]
            )
            axes.add_patch(square)
    axes.set_xlim(-0.6, heads - 0.4)
    axes.set_ylim(layers - 0.4, -0.6)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("head (place in the original)")
    axes.set_ylabel("layer")
    axes.set_title("stronger: loses more as a local head", fontsize="small")
    shown = [patches.Patch(color=COLOURS[c], label=c.name.lower()) for c in HeadClass if (classes == c).any()]
    axes.legend(handles=shown, loc="upper center", bbox_to_anchor=(0.5, -0.7 / layers - 0.1), ncols=4, frameon=False)
    for side in axes.spines.values():
        side.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
