"""Our attention, the dense ones and the local peers, each as a bare call on prepared queries, keys and values.

Layers that bring their own projections are measured without them: the projections are replaced by the prepared tensors
in the layer's own layout, so every contender is timed on the attention alone.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilevel.attention import library
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.attention.rope import rotary, rotary_tables, rotate
from trilevel.bench.problem import Problem, dense_rows, levels_rows, window_rows

Rows = Callable[[Problem, Tensor, torch.dtype], Tensor]
Build = Callable[[Problem], Callable[[], Tensor]]
Match = Literal["local", "calibrated"]
FLEX_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to attend.

    Args:
        name: as the table shows it.
        scope: what is inside the measured call.
        build: makes the call from a problem; the call gives (1, heads, tokens, dim) or a view of it.
        rows: definition of the output at some queries, (heads, rows, dim); None for what computes no attention.
        peak_bytes: predicted memory of the call from (tokens, heads, dim, bytes of an element).
        package: module that must be installed, and `matches` which of our levels a peer is compared with; both None for
            what torch and trilevel bring themselves.
    """

    name: str
    scope: str
    build: Build
    rows: Rows | None
    peak_bytes: Callable[[int, int, int, int], int]
    package: str | None = None
    matches: Match | None = None
    is_native: bool = False

    @property
    def absence(self) -> str | None:
        """Why it cannot run here, None if it can."""
        if self.is_native and not library.is_available():
            return library.status().reason
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed: pip install 'trilevel[bench]'"


class Given(nn.Module):
    """Stands for a projection and gives a prepared tensor; a copy where the layer writes into it."""

    def __init__(self, tensor: Tensor, *, copy: bool = False) -> None:
        super().__init__()
        self.tensor, self.copy = tensor, copy

    def forward(self, _: Tensor) -> Tensor:
        """The prepared tensor, whatever the input."""
        return self.tensor.clone() if self.copy else self.tensor


def ours(name: str, levels: Levels, impl: Literal["blocked", "native"] = "blocked") -> Contender:
    """One of our implementations with other levels than the problem's own."""

    def build(problem: Problem) -> Callable[[], Tensor]:
        from trilevel.attention.api import multi_level_attention

        wants_score = levels.ratio.split(problem.heads).global_ > 0
        call = functools.partial(
            multi_level_attention, problem.query, problem.key, problem.value, levels=levels, impl=impl,
            global_score=problem.global_score if wants_score else None,
        )  # fmt: skip
        return lambda: _tensor(call())

    return Contender(
        name=name,
        scope="attention core: q, k, v (1, heads, tokens, dim), token scores given",
        build=build,
        rows=lambda problem, rows, dtype: levels_rows(problem, rows, dtype, levels),
        peak_bytes=lambda tokens, heads, dim, size: 12 * tokens * heads * dim * max(size, 4),
        is_native=impl == "native",
    )


def own_variants(levels: Levels) -> dict[str, Contender]:
    """Ours by key: calibrated, strict, the local level with its remainder, and its window alone (what peers do)."""
    return {key: ours(f"trilevel {name}", own) for key, (name, own) in _variants(levels).items()}


def native_variants(levels: Levels) -> dict[str, Contender]:
    """The native kernels by key: all but strict, whose regional and global heads run elsewhere."""
    return {
        key: ours(f"trilevel native {name}", own, "native")
        for key, (name, own) in _variants(levels).items()
        if key != "strict"
    }


def _variants(levels: Levels) -> dict[str, tuple[str, Levels]]:
    local = dataclasses.replace(levels, ratio=LevelRatio(1, 0, 0))
    return {
        "calibrated": ("calibrated", levels),
        "strict": ("strict", dataclasses.replace(levels, mode="strict")),
        "local+remainder": ("local + remainder", local),
        "local": ("local", dataclasses.replace(local, mode="strict")),
    }


def fusion(levels: Levels) -> list[Contender]:
    """From the fused projection's output to the output projection's input, rotated in the kernels or beforehand."""

    def build(problem: Problem, *, is_inside: bool) -> Callable[[], Tensor]:
        from trilevel.attention.api import multi_level_attention

        tokens, heads = problem.tokens, problem.heads
        projected = torch.cat([problem.query, problem.key, problem.value], 1).transpose(1, 2).contiguous()
        tables = rotary_tables(torch.arange(tokens)[None], problem.query.shape[3])

        def call() -> Tensor:
            query, key, value = projected.transpose(1, 2).split(heads, 1)
            if not is_inside:
                query, key, value = rotate(query, *tables), rotate(key, *tables), value.contiguous()
            out = multi_level_attention(
                query, key, value, levels=levels, impl="native", global_score=problem.global_score,
                rotary=tables if is_inside else None,
            )  # fmt: skip
            return split_heads(_tensor(out).transpose(1, 2).flatten(2), heads)

        return call

    def rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
        positions = torch.arange(problem.tokens)[None]
        query, key = (rotary(x.to(dtype), positions) for x in (problem.query, problem.key))
        return levels_rows(dataclasses.replace(problem, query=query, key=key), rows, dtype, levels)

    return [
        Contender(
            name=f"trilevel native calibrated, rotary {where}",
            scope="from the fused projection's output to the output projection's input, rotary tables given",
            build=functools.partial(build, is_inside=where == "inside"),
            rows=rows,
            peak_bytes=_tensors(8),
            is_native=True,
        )
        for where in ("inside", "beforehand")
    ]


def copy_floor() -> Contender:
    """Copies of queries, keys, values and an output: what any attention has to move."""

    def build(p: Problem) -> Callable[[], Tensor]:
        output = torch.zeros_like(p.query)
        return lambda: [x.clone() for x in (p.query, p.key, p.value, output)][-1]

    return Contender(
        name="copy of q, k, v, o",
        scope="clone of each of the four tensors, the output's memory being new in every contender",
        build=build,
        rows=None,
        peak_bytes=_tensors(5),
    )


def dense() -> Contender:
    """`scaled_dot_product_attention` on everything."""
    return Contender(
        name="dense SDPA",
        scope="attention core",
        build=lambda p: lambda: F.scaled_dot_product_attention(p.query, p.key, p.value),
        rows=dense_rows,
        peak_bytes=_tensors(2),
    )


def masked() -> Contender:
    """`scaled_dot_product_attention` with an n x n bool mask of the window, as HF's sliding layers run on a CPU."""

    def build(p: Problem) -> Callable[[], Tensor]:
        at = torch.arange(p.tokens)
        mask = (at[:, None] - at).abs() <= p.levels.radius
        return lambda: F.scaled_dot_product_attention(p.query, p.key, p.value, attn_mask=mask)

    return Contender(
        name="masked SDPA",
        scope="attention core; the n x n mask is made beforehand",
        build=build,
        rows=window_rows,
        # torch turns the bool mask into one of the query's type
        peak_bytes=lambda n, heads, dim, size: n * n * (1 + size) + 2 * n * heads * dim * size,
        matches="local",
    )


def flex() -> Contender:
    """Compiled FlexAttention with blocks of 32, its block mask built without the n x n detour."""

    def build(p: Problem) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        # past eight shapes dynamo gives up and runs flex_attention dense and unfused
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        mask = window_block_mask(p.tokens, p.levels.radius)
        compiled(p.query, p.key, p.value, block_mask=mask)
        return lambda: compiled(p.query, p.key, p.value, block_mask=mask)

    return Contender(
        name="FlexAttention",
        scope="attention core, compiled; block mask and compilation beforehand",
        build=build,
        rows=window_rows,
        peak_bytes=_tensors(4),
        matches="local",
    )


def window_block_mask(tokens: int, radius: int, block: int = FLEX_BLOCK) -> Any:
    """Block mask of |i - j| <= radius in O(tokens / block) work; `create_block_mask` takes O(tokens^2)."""
    from torch.nn.attention.flex_attention import BlockMask

    def near(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= radius

    blocks = -(-tokens // block)
    reach = -(-radius // block)
    row = torch.arange(blocks)
    column = row[:, None] + torch.arange(-reach, reach + 1)
    inside = (column >= 0) & (column < blocks)
    # the blocks of a row come first, the rest of the row is never read
    order = (~inside).int().argsort(dim=1, stable=True)
    indices = torch.zeros(blocks, blocks, dtype=torch.int32)
    width = min(column.shape[1], blocks)
    indices[:, :width] = column.clamp(0, blocks - 1).gather(1, order)[:, :width].int()
    counts = inside.sum(1).int()[None, None]
    return BlockMask.from_kv_blocks(
        counts, indices[None, None], BLOCK_SIZE=block, mask_mod=near, seq_lengths=(tokens, tokens)
    )


def local_attention() -> Contender:
    """`LocalAttention` of the local-attention package with `exact_windowsize`, whose window is then ours."""

    def build(p: Problem) -> Callable[[], Tensor]:
        from local_attention import LocalAttention

        layer = LocalAttention(
            window_size=p.levels.radius, causal=False, exact_windowsize=True, autopad=p.tokens % p.levels.radius > 0
        )
        return lambda: _tensor(layer(p.query, p.key, p.value))

    return Contender(
        name="local-attention",
        scope="attention core",
        build=build,
        rows=window_rows,
        # keys and values are gathered three windows wide, logits and weights three radii wide
        peak_bytes=lambda n, heads, dim, size: n * heads * size * (8 * dim + 12 * FLEX_BLOCK),
        package="local_attention",
        matches="local",
    )


def longformer() -> Contender:
    """`LongformerSelfAttention` of transformers without global tokens, its projections replaced."""

    def build(p: Problem) -> Callable[[], Tensor]:
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        heads, dim = p.heads, p.query.shape[3]
        config = LongformerConfig(
            hidden_size=heads * dim, num_attention_heads=heads, attention_window=[2 * p.levels.radius],
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        make: Callable[..., Any] = LongformerSelfAttention
        layer = make(config, layer_id=0).to(p.query.dtype).eval()
        q, k, v = (x[0].transpose(0, 1).reshape(p.tokens, 1, heads * dim) for x in (p.query, p.key, p.value))
        layer.query, layer.key, layer.value = Given(q, copy=True), Given(k), Given(v)
        hidden = torch.zeros(1, p.tokens, heads * dim, dtype=p.query.dtype)
        masks = {
            "attention_mask": torch.zeros(1, p.tokens),
            "is_index_masked": torch.zeros(1, p.tokens, dtype=torch.bool),
            "is_index_global_attn": torch.zeros(1, p.tokens, dtype=torch.bool),
            "is_global_attn": False,
        }
        return lambda: split_heads(layer(hidden, **masks)[0], heads)

    return Contender(
        name="HF Longformer",
        scope="attention core: projections replaced by prepared q, k, v (and one copy of q, written to)",
        build=build,
        rows=window_rows,
        peak_bytes=lambda n, heads, dim, size: n * heads * (10 * dim + 16 * FLEX_BLOCK) * 4,
        package="transformers",
        matches="local",
    )


def all_peers() -> list[Contender]:
    """Every contender that is not ours, dense SDPA first."""
    from trilevel.bench.nsa import native_sparse_attention

    return [dense(), masked(), flex(), longformer(), local_attention(), native_sparse_attention()]


def _tensors(count: int) -> Callable[[int, int, int, int], int]:
    return lambda tokens, heads, dim, size: count * tokens * heads * dim * size


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * dim) as (batch, heads, tokens, dim)."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
