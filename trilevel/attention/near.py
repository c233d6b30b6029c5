"""Heads that see near(i) and nothing else, bidirectional, without gradients: torch's fused attention, block by block.

Every block of queries is a row of the batch of `scaled_dot_product_attention`, its keys a view of the input. Logits
never leave the kernel, and its output already stands as the output projection reads it: tokens before heads.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilevel.attention.call import Call
from trilevel.attention.geometry import Geometry
from trilevel.attention.rows import Rows, near_mask, window_width, windows

# query elements of a run: its output (2 MiB of float32) is copied while in cache, and a run still feeds many cores
RUN_ELEMENTS = 512 * 1024


def near_attention(call: Call, geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, block: int, into: Tensor) -> Tensor:
    """Attention of every query to near(i), written to `into` (batch, heads, tokens, dim), which is returned."""
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    step = block * max(1, RUN_ELEMENTS // (q.shape[1] * q.shape[3] * block))
    for rows, is_inner in _runs(q.shape[2], call.levels.radius, block, step):
        same = is_inner and call.valid is None and call.segment is None
        masked = Rows.part(rows.start, rows.start + block, block) if same else rows
        mask = near_mask(geometry, masked, call.levels.radius, is_causal=False).flatten(1, 3)
        for row in range(q.shape[0]):
            own = slice(row, row + 1)
            sees = mask[0 if mask.shape[0] == 1 else row][:, None]
            _attend_run(call, rows, q[own], k[own], v[own], sees, into[own])
    return into


def _runs(tokens: int, radius: int, block: int, step: int) -> list[tuple[Rows, bool]]:
    """Runs of at most `step` rows, and whether their windows lie inside the row: views, masked alike."""
    first = -(-radius // block) * block
    last = max(first, (tokens + block + radius - window_width(radius, False, block)) // block * block)
    cuts = sorted({*range(0, first, step), *range(first, last, step), *range(last, tokens, step), tokens})
    return [
        (Rows.part(start, min(stop, tokens), block), first <= start and stop <= last)
        for start, stop in pairwise(cut for cut in cuts if cut <= tokens)
    ]


def _attend_run(call: Call, rows: Rows, q: Tensor, k: Tensor, v: Tensor, sees: Tensor, into: Tensor) -> None:
    """One run of one row of the batch; sees (blocks or 1, 1, block, width)."""
    groups, length = k.shape[1], rows.stop - rows.start
    per_group = q.shape[1] // groups
    # heads that share keys stand as further queries of a block: (blocks, groups, heads per group * block, dim)
    shared = (groups, per_group, rows.num_blocks, rows.block, q.shape[3])
    queries = rows.vectors(q).view(shared).permute(2, 0, 1, 3, 4).flatten(2, 3)
    keys, values = (windows(x, rows, call.levels.radius, is_causal=False)[0].transpose(0, 1) for x in (k, v))
    mask = sees.repeat(1, 1, per_group, 1)
    out = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=call.scale)
    by_token = out.unflatten(2, (per_group, rows.block)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    into[0, :, rows.start : rows.stop] = by_token[:length].transpose(0, 1)
