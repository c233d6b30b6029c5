"""Where a token stands: in its segment, and among the real tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def places_in_segments(segment_ids: Tensor) -> Tensor:
    """Place of each token behind the first of its segment, (batch, tokens); ids must not decrease.

    >>> places_in_segments(torch.tensor([[4, 4, 4, 7, 7]]))
    tensor([[0, 1, 2, 0, 1]])
    """
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    is_first = torch.ones_like(segment_ids, dtype=torch.bool)
    is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - torch.where(is_first, places, 0).cummax(dim=1).values


def places_of_real_tokens(padding_mask: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """Real tokens before each token, in its segment when there are segments, (batch, tokens).

    >>> places_of_real_tokens(torch.tensor([[True, False, False, True, False]]))
    tensor([[0, 0, 1, 2, 2]])
    """
    before = (~padding_mask).cumsum(dim=1) - (~padding_mask).long()
    if segment_ids is None:
        return before
    first = torch.arange(before.shape[1], device=before.device) - places_in_segments(segment_ids)
    return before - before.gather(1, first)
