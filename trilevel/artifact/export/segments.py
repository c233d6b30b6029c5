"""Models with exits as graphs that are run one after another: no weight is stored twice."""

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


class Piece(nn.Module):
    """A segment.

    Attributes:
        reads: names of what it takes, in order.
        gives: names of what it returns, in order; `NEXT` begins those that the next segment reads. One stands alone.
    """

    reads: tuple[str, ...]
    gives: tuple[str, ...]


class SegmentGraph(Piece):
    """One segment of a classifier with the head behind it, and nothing of the others.

    Args:
        model: with exits; left alone.
        segment: its number, from 0; the first has the embedding.
        reads: names of the model's inputs, what is embedded and the mask where there is one.
    """

    def __init__(self, model: Any, segment: int, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads) if segment == 0 else (HIDDEN, *(name for name in reads if name == MASK))
        self.model, self.segment = copy.deepcopy(model), segment
        ends = (0, *model.config.exits, len(model.encoder.stack.blocks))
        self.is_last = segment == len(ends) - 2
        self.gives = (LOGITS,) if self.is_last else (NEXT + HIDDEN, LOGITS)
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


def classifier_segments(model: Segmented, reads: Sequence[str]) -> list[Piece]:
    """The segments of a classifier with exits; `reads` are the names of its inputs."""
    return [SegmentGraph(model, number, reads) for number in range(len(model.config.exits) + 1)]


def export_segments(
    pieces: Sequence[Piece],
    family: str,
    example: Mapping[str, Tensor],
    axes: Mapping[str, Sequence[int | str]],
    folder: Path,
    *,
    is_native: bool = False,
) -> tuple[Segment, ...]:
    """Write the segments of a model as files of a family in `folder`.

    Args:
        pieces: one after another.
        family: its name, see `Manifest.families`.
        example: what the first one reads; see `export_onnx`.
        axes: see `export_onnx`, for all that any of them reads or gives, without `NEXT`.
        folder: to write to.
        is_native: see `export_onnx`.
    """
    made = []
    given = dict(example)
    named = {**axes, **{NEXT + name: own for name, own in axes.items()}}
    for number, piece in enumerate(pieces):
        inputs = {name: given[name] for name in piece.reads}
        path, module = folder / segment_file(family, number), piece.eval()
        wanted = piece.gives if len(piece.gives) > 1 else piece.gives[0]
        reads, gives = export_onnx(module, inputs, named, path, output=wanted, is_native=is_native)
        made.append(Segment(inputs=reads, outputs=gives))
        with torch.no_grad():
            found = piece(*inputs.values())
        tensors = found if isinstance(found, tuple) else (found,)
        given |= {name.removeprefix(NEXT): tensor for name, tensor in zip(piece.gives, tensors, strict=True)}
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
