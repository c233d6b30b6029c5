"""The model as one graph of arrays: what is exported. Every unit passes the deep blocks (`focus_fraction=1.0`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from trilevel.applications.documents.encoded import MAX_UNIT_TOKENS
from trilevel.applications.documents.model import DocumentModel


class ScoringGraph(nn.Module):
    """Scores (batch, units) from the arrays of `artifact.graph_inputs`, in operators that every runtime has.

    Where units end says which tokens are theirs and what is padding, so no other mask is needed. Focus would keep a
    number of tokens that depends on their scores, which not every runtime can.
    """

    def __init__(self, model: DocumentModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, token_prior: Tensor, unit_ends: Tensor, unit_features: Tensor, unit_prior: Tensor
    ) -> Tensor:
        """Score units; a unit of padding gets 0."""
        assert self.model.encoder is not None
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.model.encoder(
            input_ids,
            padding_mask=place >= unit_ends.amax(1, keepdim=True),
            global_prior=token_prior,
            focus_fraction=1.0 if self.model.config.focus else None,
        )
        starts = pad(unit_ends[:, :-1], (1, 0))
        padding = starts >= unit_ends
        means = mean_between(hidden, starts, unit_ends)
        units = self.model.over_units(means, unit_features, padding_mask=padding, prior=unit_prior)
        return torch.where(padding, 0.0, self.model.score(units.hidden).squeeze(-1))


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
