"""A classifier with exits as graphs that are run one after another: no weight is stored twice."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.manifest import NEXT, Segment, segment_file
from trilevel.artifact.probe import Probe
from trilevel.model.exits import Segmented, run_segment, run_segments

MASK = "attention_mask"
HIDDEN, LOGITS = "hidden", "logits"


class SegmentGraph(nn.Module):
    """One segment with the head behind it, and nothing of the others.

    Args:
        model: with exits; left alone.
        segment: its number, from 0; the first has the embedding.
    """

    def __init__(self, model: Any, segment: int) -> None:
        super().__init__()
        self.model, self.segment = copy.deepcopy(model), segment
        ends = (0, *model.config.exits, len(model.encoder.stack.blocks))
        self.is_last = segment == len(ends) - 2
        blocks, heads = self.model.encoder.stack.blocks, self.model.exits
        for place in range(len(blocks)):
            if not ends[segment] <= place < ends[segment + 1]:
                blocks[place] = nn.Identity()
        for place in range(len(heads)):
            if place != segment:
                heads[place] = nn.Identity()

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map inputs, or what the segment before gave, to `next_hidden` and `logits`, the last to `logits` alone."""
        padding = None if attention_mask is None else attention_mask == 0
        hidden = self.model.embed(inputs, padding) if self.segment == 0 else inputs
        hidden, logits = run_segment(self.model, self.segment, hidden, padding)
        return logits if self.is_last else (hidden, logits)


def export_segments(
    model: Segmented,
    family: str,
    example: Mapping[str, Tensor],
    axes: Mapping[str, Sequence[int | str]],
    folder: Path,
) -> tuple[Segment, ...]:
    """Write the segments of a model as files of a family in `folder`.

    Args:
        model: in evaluation mode.
        family: its name, see `Manifest.families`.
        example: inputs of the model, first what is embedded, then the mask where there is one; see `export_onnx`.
        axes: see `export_onnx`, for the inputs, `hidden` and `logits`.
        folder: to write to.
    """
    made = []
    given, named = dict(example), {**axes, NEXT + HIDDEN: axes[HIDDEN]}
    for number in range(len(model.config.exits) + 1):
        graph = SegmentGraph(model, number).eval()
        names = LOGITS if graph.is_last else (NEXT + HIDDEN, LOGITS)
        inputs, outputs = export_onnx(graph, given, named, folder / segment_file(family, number), output=names)
        made.append(Segment(inputs=inputs, outputs=outputs))
        if not graph.is_last:
            with torch.no_grad():
                hidden, _ = graph(*given.values())
            given = {HIDDEN: hidden} | {name: tensor for name, tensor in given.items() if name == MASK}
    return tuple(made)


def segment_probes(model: Segmented, calls: Sequence[Mapping[str, Tensor]]) -> list[Probe]:
    """What torch answers behind each segment: `logits` (batch, segments, classes) for the inputs of each call."""
    probes = []
    for call in calls:
        inputs, *masks = call.values()
        padding = masks[0] == 0 if masks else None
        with torch.no_grad():
            _, logits = run_segments(model, model.embed(inputs, padding), padding)
        arrays = {name: tensor.numpy() for name, tensor in call.items()}
        probes.append(Probe(inputs=arrays, outputs={LOGITS: logits.numpy()}))
    return probes
