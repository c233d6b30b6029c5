"""A summariser on a pretrained encoder in segments: a head behind each scores the units, and the best of them go on.

Every head is the part over units of the run, trained further on what its segment says of the units. Behind the first
segment focus thins the document out (`trilevel.artifact.runtime.focus`), so that deeper blocks see a share of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trilevel.applications.documents.backbone import Backbone
from trilevel.applications.documents.graph import mean_between, with_specials
from trilevel.applications.documents.model import DocumentModel
from trilevel.artifact.export.segments import Piece
from trilevel.artifact.manifest import NEXT
from trilevel.artifact.runtime.focus import HIDDEN, KEPT, OUT, focused, scattered
from trilevel.model.encoder import Encoder

WORDS, SCORES = "words", "scores"
UNITS = ("unit_ends", "unit_features", "unit_prior")
INPUTS = ("input_ids", "token_prior", *UNITS)
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a segment made: of which arrays, hidden states (batch, tokens, dim) without special tokens, scores."""

    arrays: Arrays
    hidden: Tensor
    scores: np.ndarray


class DocumentPaths(nn.Module):
    """The encoder of a summariser, its table of words, and a head behind each of its segments.

    Args:
        encoder: pretrained, left alone.
        backbone: its sizes and special tokens.
        heads: models without an encoder, one for each segment; their tables of words must be equal, and one is kept.
        exits: blocks behind which segments end, but for the last.
        fraction: of the tokens that go on behind the first segment.
    """

    def __init__(
        self, encoder: Encoder, backbone: Backbone, heads: Sequence[DocumentModel], exits: tuple[int, ...],
        fraction: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.exits, self.fraction = backbone, exits, fraction
        self.encoder = copy.deepcopy(encoder)
        self.heads = nn.ModuleList(copy.deepcopy(head) for head in heads)
        first: Any = self.heads[0]
        self.words = first.unit_input.words
        for head in self.heads:
            head.unit_input.words = None  # type: ignore[union-attr]  # heads stand on a backbone

    @property
    def around(self) -> tuple[int, int]:
        """Special tokens before and behind a document."""
        return len(self.backbone.ids_before), len(self.backbone.ids_after)

    def blocks_of(self, segment: int) -> tuple[int, int]:
        """The first block of a segment, and the one behind its last."""
        ends = (0, *self.exits, len(self.encoder.stack.blocks))
        return ends[segment], ends[segment + 1]

    def pieces(self) -> list[DocumentPiece]:
        """One graph for each segment, with nothing of the others."""
        return [FirstPiece(self), *(DeepPiece(self, segment) for segment in range(1, len(self.heads)))]

    def forward(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Scores (batch, units) of each head, of the inputs of the whole graph."""
        return [
            torch.from_numpy(scattered(seen.scores, seen.arrays[KEPT]) if KEPT in seen.arrays else seen.scores)
            for seen in self.walk({name: tensor.numpy() for name, tensor in inputs.items()})
        ]

    @torch.no_grad()
    def walk(self, arrays: Arrays, *, deepest: int | None = None) -> Iterator[Seen]:
        """All segments, or up to one, with focus in between as runtimes have it."""
        for segment in range(len(self.heads) if deepest is None else deepest + 1):
            given = {name: torch.from_numpy(array) for name, array in arrays.items()}
            hidden, words, scores = self.run(segment, given)
            before, behind = self.around
            yield Seen(arrays=arrays, hidden=hidden[:, before : hidden.shape[1] - behind], scores=scores.numpy())
            arrays = {**arrays, HIDDEN: hidden.numpy()} | ({} if words is None else {WORDS: words.numpy()})
            if segment == 0:
                arrays = {name: arrays[name] for name in (HIDDEN, WORDS, *UNITS) if name in arrays}
                arrays = focused(arrays, scores.numpy(), self.fraction, self.around)

    def run(self, segment: int, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """One segment: hidden states with special tokens, means of words over units, scores of the head behind it."""
        ends = given["unit_ends"]
        starts = pad(ends[:, :-1], (1, 0))
        padding = starts >= ends
        before, behind = self.around
        if segment == 0:
            ids, mask = with_specials(given["input_ids"], ends, self.backbone)
            words = None if self.words is None else mean_between(self.words(given["input_ids"]), starts, ends)
            hidden = self.encoder.embed(ids, padding_mask=mask)
        else:
            hidden, words = given[HIDDEN], given.get(WORDS)
            place = torch.arange(hidden.shape[1], device=hidden.device)
            mask = place >= ends.amax(1, keepdim=True) + before + behind
        hidden = self.encoder.run(hidden, *self.blocks_of(segment), padding_mask=mask)
        own = hidden.index_select(1, torch.arange(hidden.shape[1] - before - behind, device=hidden.device) + before)
        head: Any = self.heads[segment]
        x = head.unit_input(mean_between(own, starts, ends), words, padding)
        units = head.over_units(x, given["unit_features"], padding_mask=padding, prior=given["unit_prior"])
        return hidden, words, torch.where(padding, OUT, head.score(units.hidden).squeeze(-1))


class DocumentPiece(Piece):
    """One segment; see `DocumentPaths`."""

    def __init__(self, paths: DocumentPaths, segment: int) -> None:
        super().__init__()
        self.paths, self.segment = copy.deepcopy(paths), segment
        first, last = paths.blocks_of(segment)
        blocks = self.paths.encoder.stack.blocks
        for place in range(len(blocks)):
            if not first <= place < last:
                blocks[place] = nn.Identity()
        for place in range(len(self.paths.heads)):
            if place != segment:
                self.paths.heads[place] = nn.Identity()
        self.is_last = segment == len(paths.heads) - 1


class FirstPiece(DocumentPiece):
    """From tokens to hidden states and means of words."""

    reads = INPUTS

    def __init__(self, paths: DocumentPaths) -> None:
        super().__init__(paths, 0)
        self.gives = (NEXT + HIDDEN, SCORES) if paths.words is None else (NEXT + HIDDEN, SCORES, NEXT + WORDS)

    def forward(
        self, input_ids: Tensor, token_prior: Tensor, unit_ends: Tensor, unit_features: Tensor, unit_prior: Tensor
    ) -> tuple[Tensor, ...]:
        """Map what it reads to what it gives; a pretrained encoder takes no prior of tokens."""
        given = {"input_ids": input_ids, **dict(zip(UNITS, (unit_ends, unit_features, unit_prior), strict=True))}
        hidden, words, scores = self.paths.run(0, given)
        return (hidden, scores) if words is None else (hidden, scores, words)


class DeepPiece(DocumentPiece):
    """From hidden states to deeper ones."""

    def __init__(self, paths: DocumentPaths, segment: int) -> None:
        super().__init__(paths, segment)
        self.paths.words = None
        self.reads = (HIDDEN, *UNITS) if paths.words is None else (HIDDEN, *UNITS, WORDS)
        self.gives = (SCORES,) if self.is_last else (NEXT + HIDDEN, SCORES)

    def forward(
        self,
        hidden: Tensor,
        unit_ends: Tensor,
        unit_features: Tensor,
        unit_prior: Tensor,
        words: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Map what it reads to what it gives."""
        given = {HIDDEN: hidden, **dict(zip(UNITS, (unit_ends, unit_features, unit_prior), strict=True))}
        hidden, _, scores = self.paths.run(self.segment, given if words is None else {**given, WORDS: words})
        return scores if self.is_last else (hidden, scores)
