"""What both forms of exported attention share: addends of logits, the choice of global tokens, summaries of regions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilevel.attention.call import Call

HIDDEN = -1e9
"""Added to a logit that counts for nothing; finite, as some runtimes make NaN of -inf."""


def hide(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token is seen, `HIDDEN` elsewhere."""
    return torch.where(seen, 0.0, HIDDEN).to(dtype)


def log_count(count: Tensor, dtype: torch.dtype) -> Tensor:
    """Logarithm of a number of tokens, `HIDDEN` of none."""
    return torch.where(count > 0, count.clamp(min=1).to(dtype).log(), HIDDEN).to(dtype)


def length_of(call: Call) -> Tensor:
    """Real tokens of each row, (batch or 1, 1, 1, 1)."""
    if call.valid is None:
        return torch.full((1, 1, 1, 1), call.query.shape[2], device=call.query.device)
    return call.valid.long().sum(1)[:, None, None, None]


def chosen_tokens(call: Call) -> Tensor:
    """Positions of the global tokens, (batch, p); of equal scores the earlier ones."""
    batch, _, tokens, _ = call.query.shape
    score = call.query.new_zeros(batch, tokens) if call.score is None else call.score.detach()
    if call.valid is not None:
        score = torch.where(call.valid, score, HIDDEN)
    count = call.levels.num_global_tokens
    most = min(count, tokens) if isinstance(tokens, int) else torch.sym_min(count, tokens)
    if torch.compiler.is_exporting():
        return first_of_best(score, most)
    return torch.sort(score, dim=1, descending=True, stable=True).indices[:, :most]


def first_of_best(score: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of each row, of equal ones the earlier; (batch, tokens) to (batch, count).

    In the first layer a token scores the same wherever it stands, and of equal scores OpenVINO's TopK takes any. So the
    least score is looked up, and positions, which all differ, are chosen.
    """
    least = torch.topk(score, count, dim=1).values[:, -1:]
    tokens = score.shape[1]
    place = torch.arange(tokens, device=score.device)
    rank = torch.where(score > least, 2 * tokens, torch.where(score == least, tokens, 0)) - place
    return torch.topk(rank, count, dim=1).indices


def region_size(call: Call) -> int:
    """Tokens of a region."""
    assert call.levels.region_size is not None
    return call.levels.region_size


def pooled(call: Call, key: Tensor, value: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """A summary a region, keys and values (batch, heads, regions, dim); that of an empty region means nothing."""
    batch, heads, tokens, dim = key.shape
    size = region_size(call)
    regions = (tokens + size - 1) // size
    key, value = (
        pad(x, (0, 0, 0, regions * size - tokens)).reshape(batch, heads, regions, size, dim) for x in (key, value)
    )
    position = torch.arange(regions * size, device=key.device).view(1, 1, regions, size)
    bias = hide(position < length_of(call), key.dtype)
    logit = bias.expand(batch, heads, -1, -1) if weight is None else (key * weight[:, None, None, :]).sum(-1) + bias
    share = torch.softmax(logit, -1)[..., None, :]
    return (share @ key).squeeze(-2), (share @ value).squeeze(-2)
