"""Exported attention of a few tokens whose number is fixed, such as an image's patches: whole matrices of logits.

The tokens that a query sees only as their mean weigh `exp(mean logit)` each. So their logits are replaced by the mean,
and one softmax does the rest, in a fifth of the operators of `graph_blocks`. Each operator costs microseconds: at 196
tokens more than the products that blocks save.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from trilevel.attention.call import Call
from trilevel.attention.impl.graph_entries import chosen_tokens, hide, log_count, pooled, region_size


class Form:
    """The head classes of a call, each `(batch, heads, tokens, dim)` of queries, keys and values to outputs."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._place = torch.arange(call.key.shape[2], device=call.key.device)
        self._near = (self._place[:, None] - self._place).abs() <= call.levels.radius

    def local(self, q: Tensor, k: Tensor, v: Tensor, _weight: Tensor | None) -> Tensor:
        """Heads that see their window, sinks, and the mean of the rest."""
        seen = self._near | (self._place < self._call.levels.num_sinks)
        return self._with_mean(seen.to(k.dtype), q, k, v)

    def global_(self, q: Tensor, k: Tensor, v: Tensor, _weight: Tensor | None) -> Tensor:
        """Heads that see their window, the chosen tokens, and the mean of the rest."""
        is_chosen = (chosen_tokens(self._call)[..., None] == self._place).to(k.dtype).sum(1)
        return self._with_mean(torch.maximum(self._near.to(k.dtype), is_chosen[:, None, None, :]), q, k, v)

    def regional(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
        """Heads that see their window and summaries of regions."""
        keys, values = pooled(self._call, k, v, weight)
        size, regions = region_size(self._call), keys.shape[2]
        outside = self._real(~self._near).long()
        counts = pad(outside, (0, regions * size - k.shape[2])).unflatten(-1, (regions, size)).sum(-1)
        bias = torch.cat([hide(self._real(self._near), k.dtype), log_count(counts, k.dtype)], -1)
        logits = (q * self._call.scale) @ torch.cat([k, keys], 2).transpose(-1, -2) + bias
        return torch.softmax(logits, -1) @ torch.cat([v, values], 2)

    def _with_mean(self, seen: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`seen` is 1 or 0, for runtimes multiply many times faster than they choose."""
        q, valid = q * self._call.scale, self._call.valid
        rest = 1 - seen if valid is None else (1 - seen) * valid[:, None, None, :]
        mean = (q * ((rest / rest.sum(-1, keepdim=True).clamp(min=1)) @ k)).sum(-1, keepdim=True)
        logits = (q @ k.transpose(-1, -2)) * seen + mean * rest
        if valid is not None:
            logits = logits + hide(valid, logits.dtype)[:, None, None, :]
        return torch.softmax(logits, -1) @ v

    def _real(self, keys: Tensor) -> Tensor:
        """Those of `keys` that are no padding."""
        return keys if self._call.valid is None else keys & self._call.valid[:, None, None, :]
