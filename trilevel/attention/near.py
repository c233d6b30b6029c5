"""Heads that see near(i) and nothing else, bidirectional, without gradients.

A block of queries and the window of keys around it are one entry of a batch, views of the input. The batch goes through
two products in the input's type where the processor's library has fast ones, else through torch's fused attention.
Measured in decision 0006.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilevel.attention.call import Call
from trilevel.attention.geometry import Geometry
from trilevel.attention.rows import Rows, near_mask, window_width, windows

# query elements of a run that are computed at once: what passes between operators stays in cache, many cores have work
RUN_ELEMENTS = 512 * 1024


def near_attention(call: Call, geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, block: int, into: Tensor) -> Tensor:
    """Attention of every query to near(i), written to `into` (batch, heads, tokens, dim), which is returned."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    by_products = has_fast_products(q.dtype)
    heads_at_once = q.shape[1] // k.shape[1] if by_products else q.shape[1]
    step = block * max(1, RUN_ELEMENTS // (heads_at_once * q.shape[3] * block))
    for rows, is_inner in _runs(q.shape[2], call.levels.radius, block, step):
        same = is_inner and call.valid is None and call.segment is None
        masked = Rows.part(rows.start, rows.start + block, block) if same else rows
        mask = near_mask(geometry, masked, call.levels.radius, is_causal=False).flatten(1, 3)
        attend = _by_products if by_products and is_inner else _fused
        for row in range(q.shape[0]):
            own = slice(row, row + 1)
            blocks = _blocks(rows, call.levels.radius, q[own], k[own], v[own], mask[0 if mask.shape[0] == 1 else row])
            attend(blocks, call.scale, into[row, :, rows.start : rows.stop])
    return into


def _runs(tokens: int, radius: int, block: int, step: int) -> list[tuple[Rows, bool]]:
    """Runs of at most `step` rows, and whether their windows lie inside the row: whole blocks, all masked alike."""
    first = -(-radius // block) * block
    last = max(first, (tokens + block + radius - window_width(radius, False, block)) // block * block)
    cuts = sorted({*range(0, first, step), *range(first, last, step), *range(last, tokens, step), tokens})
    return [
        (Rows.part(start, min(stop, tokens), block), first <= start and stop <= last)
        for start, stop in pairwise(cut for cut in cuts if cut <= tokens)
    ]


class _Blocks(NamedTuple):
    """One run of one row of the batch; heads that share keys stand as further queries of a block.

    q (blocks, groups, heads per group * block, dim); k, v (blocks, groups, width, dim), views of the input unless they
    reach beyond its ends; sees (blocks or 1, heads per group * block, width).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sees: Tensor
    per_group: int


def _blocks(rows: Rows, radius: int, q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> _Blocks:
    groups, per_group = k.shape[1], q.shape[1] // k.shape[1]
    shape = (groups, per_group, rows.num_blocks, rows.block, q.shape[3])
    keys, values = (windows(x, rows, radius, is_causal=False)[0].transpose(0, 1) for x in (k, v))
    queries = rows.vectors(q).view(shape).permute(2, 0, 1, 3, 4).flatten(2, 3)
    return _Blocks(queries, keys, values, sees.repeat(1, per_group, 1), per_group)


def _fused(run: _Blocks, scale: float, into: Tensor) -> None:
    """Logits never leave the kernel, and its output stands as the output projection reads it: tokens before heads."""
    out = scaled_dot_product_attention(run.q, run.k, run.v, attn_mask=run.sees[:, None], scale=scale)
    by_token = out.unflatten(2, (run.per_group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    into.copy_(by_token[: into.shape[1]].transpose(0, 1))


def _by_products(run: _Blocks, scale: float, into: Tensor) -> None:
    """Two products a KV head in the input's type; the softmax reads and writes that type and counts in float32."""
    bias = run.q.new_zeros(run.sees.shape).masked_fill_(~run.sees, -torch.inf)
    for head, heads in enumerate(into.split(run.per_group)):
        keys = run.k[:, head]
        if keys.dtype == torch.bfloat16:
            # oneDNN copies overlapping windows; row by row that is faster than transposed
            keys = keys.contiguous()
        shares = torch.softmax(torch.baddbmm(bias, run.q[:, head], keys.transpose(1, 2), alpha=scale), -1)
        out = torch.bmm(shares, run.v[:, head]).unflatten(1, (run.per_group, -1))
        heads.unflatten(1, (out.shape[0], out.shape[2])).copy_(out.transpose(0, 1))


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether batched products of this type run in a library that has them for this processor."""
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available()
