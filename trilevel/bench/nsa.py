"""Native Sparse Attention of native-sparse-attention-pytorch as a contender, and its definition at sampled queries.

Blocks of 64 tokens are compressed to their mean (the form of flash-linear-attention; the library's default is a large
MLP), one block is selected for each query (64 tokens, as many as our global tokens), the window is ours. Rotary
positions, norm and projections are left out, all of which favours the peer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trilevel.bench.contenders import Contender, Given, split_heads
from trilevel.bench.problem import Problem, window_rows

BLOCK = 64
# the library starts with the compressed and selected branches nearly shut
GATE_LOGITS = (-2.0, -2.0, 2.0)


class _BlockMean(nn.Module):
    """Compression of a block (batch, heads, blocks, block, dim) to its mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Mean over the tokens of each block."""
        return x.mean(dim=-2)


class _NoRotation(nn.Module):
    """Positions are left out for every contender."""

    def rotate_queries_with_cached_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are."""
        return q, k


def native_sparse_attention() -> Contender:
    """`SparseAttention`, bidirectional, its projections replaced."""
    return Contender(
        name="native-sparse-attention",
        scope="attention core: projections replaced by prepared q, k, v; mean compression, gates included",
        build=_build,
        rows=_rows,
        # keys and values of the selected block are gathered for every query, twice each
        peak_bytes=lambda n, heads, dim, size: 4 * n * heads * BLOCK * dim * size,
        package="native_sparse_attention_pytorch",
        matches="calibrated",
    )


def _build(p: Problem) -> Callable[[], Tensor]:
    from native_sparse_attention_pytorch import SparseAttention

    heads, dim = p.heads, p.query.shape[3]
    layer = SparseAttention(
        dim=heads * dim, dim_head=dim, heads=heads, sliding_window_size=p.levels.radius, compress_block_size=BLOCK,
        compress_block_sliding_stride=BLOCK, selection_block_size=BLOCK, num_selected_blocks=1, causal=False,
        norm=False, compress_mlp=_BlockMean(),
    ).to(p.query.dtype).eval()  # fmt: skip
    merged = [x.transpose(1, 2).reshape(1, p.tokens, heads * dim) for x in (p.query, p.key, p.value)]
    layer.to_qkv, layer.combine_heads, layer.rotary_emb = Given(torch.cat(merged, -1)), nn.Identity(), _NoRotation()
    x = torch.zeros(1, p.tokens, heads * dim, dtype=p.query.dtype)
    return lambda: split_heads(layer(x), heads)


def _rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    q, k, v = problem.as_dtype(dtype)
    q = q[:, rows]
    whole = problem.tokens // BLOCK * BLOCK
    block_k, block_v = (x[:, :whole].unflatten(1, (-1, BLOCK)) for x in (k, v))
    logits = q @ block_k.mean(2).transpose(1, 2) * problem.scale
    # an empty memory entry of logit 0 and value 0 stands beside the blocks
    weights = torch.cat([torch.zeros_like(logits[..., :1]), logits], -1).softmax(-1)[..., 1:]
    compressed = weights @ block_v.mean(2)
    head = torch.arange(q.shape[0])[:, None]
    best = logits.argmax(-1)
    near = (q[:, :, None] @ block_k[head, best].transpose(-1, -2)) * problem.scale
    selected = (near.softmax(-1) @ block_v[head, best]).squeeze(2)
    branches = (compressed, selected, window_rows(problem, rows, dtype))
    gates = [1 / (1 + math.exp(-logit)) for logit in GATE_LOGITS]
    return torch.stack([gate * branch for gate, branch in zip(gates, branches, strict=True)]).sum(0)
