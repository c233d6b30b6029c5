"""The model as one graph of arrays: what is exported. Every unit passes the deep blocks (`focus_fraction=1.0`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trilevel.applications.documents.backbone import Backbone
from trilevel.applications.documents.encoded import MAX_UNIT_TOKENS
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.tokenizer import PADDING_ID


class ScoringGraph(nn.Module):
    """Scores (batch, units) from the arrays of `artifact.graph_inputs`, in operators that every runtime has.

    Where units end says which tokens are theirs and what is padding, so no other mask is needed. Focus would keep a
    number of tokens that depends on their scores, which not every runtime can. A pretrained encoder is in the graph.
    """

    def __init__(self, model: DocumentModel) -> None:
        super().__init__()
        assert model.encoder is not None
        self.model = model

    def forward(
        self, input_ids: Tensor, token_prior: Tensor, unit_ends: Tensor, unit_features: Tensor, unit_prior: Tensor
    ) -> Tensor:
        """Score units; a unit of padding gets 0. A pretrained encoder takes no prior of tokens."""
        starts = pad(unit_ends[:, :-1], (1, 0))
        padding = starts >= unit_ends
        if self.model.unit_input is None:
            x = mean_between(self._hidden(input_ids, token_prior, unit_ends), starts, unit_ends)
        else:
            words = self.model.unit_input.words
            x = self.model.unit_input(
                mean_between(self._pretrained(input_ids, unit_ends), starts, unit_ends),
                None if words is None else mean_between(words(input_ids), starts, unit_ends),
                padding,
            )
        units = self.model.over_units(x, unit_features, padding_mask=padding, prior=unit_prior)
        return torch.where(padding, 0.0, self.model.score(units.hidden).squeeze(-1))

    def _hidden(self, input_ids: Tensor, token_prior: Tensor, unit_ends: Tensor) -> Tensor:
        assert self.model.encoder is not None
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden: Tensor = self.model.encoder(
            input_ids,
            padding_mask=place >= unit_ends.amax(1, keepdim=True),
            global_prior=token_prior,
            focus_fraction=1.0 if self.model.config.focus else None,
        )
        return hidden

    def _pretrained(self, input_ids: Tensor, unit_ends: Tensor) -> Tensor:
        """Vectors of the tokens (batch, tokens, dim), special tokens put around them and taken off again."""
        backbone, encoder = self.model.config.tokens, self.model.encoder
        assert isinstance(backbone, Backbone)
        assert encoder is not None
        ids, padding = with_specials(input_ids, unit_ends, backbone)
        hidden: Tensor = encoder(ids, padding_mask=padding)
        own = torch.arange(input_ids.shape[1], device=ids.device) + len(backbone.ids_before)
        return hidden.index_select(1, own)


def with_specials(input_ids: Tensor, unit_ends: Tensor, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Ids (batch, places) with special tokens around each document's (batch, tokens), and what of them is padding."""
    before, after = backbone.ids_before, backbone.ids_after
    ids = pad(input_ids, (len(before), len(after)), value=PADDING_ID)
    place = torch.arange(ids.shape[1], device=ids.device)
    end = unit_ends.amax(1, keepdim=True) + len(before)
    for number, special in enumerate(before):
        ids = torch.where(place == number, special, ids)
    for number, special in enumerate(after):
        ids = torch.where(place == end + number, special, ids)
    return ids, place >= end + len(after)


def mean_between(x: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Means of x (batch, tokens, dim) over the tokens from `starts` to before `ends` (batch, units), 128 at most.

    Sums run over blocks of 128 tokens, and a unit's is the difference of two of them: no adding into places, and no
    sum over a whole document, which would take the digits of a short unit.
    """
    batch, tokens, dim = x.shape
    size = MAX_UNIT_TOKENS
    blocks = (tokens + size) // size
    # a zero before the first token: the sum up to place i is that of the tokens before i
    padded = pad(x, (0, 0, 1, blocks * size - tokens - 1)).reshape(batch, blocks, size, dim)
    place = torch.arange(size, device=x.device)
    before = (place[:, None] >= place).to(x.dtype) @ padded
    behind = before[:, :, -1:] - before
    block = torch.arange(blocks, device=x.device)[None, :, None].expand(batch, -1, size).reshape(batch, -1)
    before, behind = (sums.reshape(batch, blocks * size, dim) for sums in (before, behind))
    crosses = (block.gather(1, starts) != block.gather(1, ends))[..., None]
    total = _at(before, ends) + torch.where(crosses, _at(behind, starts), -_at(before, starts))
    return total / (ends - starts).clamp(min=1)[..., None].to(x.dtype)


def _at(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x (batch, rows, dim) at places (batch, units)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
