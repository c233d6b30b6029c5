"""The autograd function around the kernels of `impl/triton.py`: which one runs on what, and how large its tiles are."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trilevel.attention.impl.triton_seen import Seen, Vectors
from trilevel.errors import require

# two programs for each of the 132 processors of an H100: where entries alone give fewer, their queries are split
ENOUGH_PROGRAMS = 264


@functools.cache
def forward_kernels() -> ModuleType:
    """The module of the forward kernel, imported at first use: triton is optional and takes a second.

    Raises:
        MissingExtraError: triton is not installed.
    """
    require("triton", extra="gpu")
    from trilevel.attention.impl import triton_kernels

    kernels: ModuleType = triton_kernels
    return kernels


@functools.cache
def _backward_kernels() -> ModuleType:
    from trilevel.attention.impl import triton_backward

    kernels: ModuleType = triton_backward
    return kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What has no gradient: sizes, and the heads and integer tensors of each class in head order."""

    radius: int
    is_causal: bool
    scale: float
    heads: tuple[int, ...]
    seen: tuple[Seen, ...]

    def classes(self, group: int, flat: tuple[Tensor | None, ...]) -> list[_Class]:
        """Each class with its vectors."""
        size = len(Vectors._fields)
        starts = [sum(self.heads[:index]) for index in range(len(self.heads))]
        return [
            _Class(
                heads=slice(start, start + count),
                pairs=slice(start // group, (start + count) // group),
                seen=seen,
                vectors=Vectors(*flat[index * size : (index + 1) * size]),
            )
            for index, (start, count, seen) in enumerate(zip(starts, self.heads, self.seen, strict=True))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """A head class of one call of the kernels."""

    heads: slice
    pairs: slice
    seen: Seen
    vectors: Vectors

    def counts(self) -> dict[str, int]:
        """Sets of tail tokens, tokens in a set, regions."""
        rank, span = self.seen.tail_rank, self.seen.span
        sets, width = (0, 0) if rank is None else rank.shape[1:]
        return {"num_sets": sets, "width": width, "num_regions": 0 if span is None else span.shape[2]}

    def switches(self) -> dict[str, bool]:
        """Which entries there are, as the kernels are compiled for it."""
        vectors = self.vectors
        return {
            "TAIL": vectors.tail_key is not None,
            "TAIL_BIAS": vectors.tail_bias is not None,
            "REGION": vectors.region_key is not None,
            "REST": vectors.key_sum is not None,
            "REST_ROWS": vectors.key_sum is not None and vectors.key_sum.shape[2] > 1,
        }


class Fused(torch.autograd.Function):
    """Attention of q, k, v and the vectors of each class; returns the output and its log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, shared: Shared, q: Tensor, k: Tensor, v: Tensor, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One kernel a class."""
        batch, heads, tokens, dim = q.shape
        # tokens before heads in memory: what the output projection reads
        out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
        lse, rest_logit = (q.new_empty(batch, heads, tokens, dtype=torch.float32) for _ in range(2))
        with _on_device(q):
            for one in shared.classes(heads // k.shape[1], flat):
                _forward(shared, one, q, k, v, out, lse, rest_logit)
        ctx.save_for_backward(q, k, v, out, lse, rest_logit, *flat)
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, up: Tensor | None, up_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Two to four kernels a class."""
        q, k, v, out, lse, rest_logit, *flat = ctx.saved_tensors
        up = torch.zeros_like(out) if up is None else up
        up_lse = None if up_lse is None else up_lse.contiguous()
        grads = [torch.empty_like(x) for x in (q, k, v)]
        found: list[Tensor | None] = []
        with _on_device(q):
            for one in ctx.shared.classes(q.shape[1] // k.shape[1], tuple(flat)):
                pull = _Backward(ctx.shared, one, q, k, v, out, up, lse, up_lse, rest_logit)
                found += pull.run(*grads)
        return None, *grads, *found


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tiles(dim: int, element_size: int, radius: int) -> dict[str, int]:
    """Queries and entries in a tile, the head size that fills it, and warps: what fits the registers of sm_90."""
    full = max(16, 1 << (dim - 1).bit_length())
    # products of float32 hold each operand in three parts
    row_bytes = full * (element_size if element_size < 4 else 2 * element_size)
    queries = max(16, min(64, 16_384 // row_bytes))
    entries = 16 if row_bytes > 512 else 64 if radius >= 64 and row_bytes <= 128 else 32
    return {"DIM": dim, "D": full, "BM": queries, "BN": entries, "num_warps": 4 if full <= 64 else 8}


def _tiles(shared: Shared, q: Tensor) -> dict[str, int]:
    found = tiles(q.shape[3], q.element_size(), shared.radius)
    # small tiles let small tests cross their borders
    return found | {"BM": 16, "BN": 16} if forward_kernels().INTERPRETED else found


def _stride(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": step for axis, step in zip("bhnd", x.stride(), strict=True)}


def _batch_stride(x: Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else int(x.stride(0))


def _entries(one: _Class, absent: Tensor) -> dict[str, Any]:
    """Pointers to what a class sees; one that is never read points anywhere."""
    seen, vectors = one.seen, one.vectors._asdict()
    given = {"rows": seen.rows, "tail_rank": seen.tail_rank, "region_span": seen.span, **vectors}
    return {name: absent if x is None else x for name, x in given.items()}


def _common(shared: Shared, one: _Class, q: Tensor) -> dict[str, Any]:
    return {
        **one.counts(),
        **_tiles(shared, q),
        "stat_b": q.shape[1] * q.shape[2],
        "rows_b": _batch_stride(one.seen.rows),
        "span_b": _batch_stride(one.seen.span),
        "tokens": q.shape[2],
        "radius": shared.radius,
        "scale": shared.scale,
        "TABLE": one.seen.rows is not None,
        "CAUSAL": shared.is_causal,
        # the interpreter multiplies the bits of bfloat16
        "UP": forward_kernels().INTERPRETED,
    }


def _forward(
    shared: Shared, one: _Class, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest_logit: Tensor
) -> None:
    common = _common(shared, one, q)
    q, out, lse, rest_logit = (x[:, one.heads] for x in (q, out, lse, rest_logit))
    k, v = k[:, one.pairs], v[:, one.pairs]
    batch, heads, tokens, _ = q.shape
    grid = (-(-tokens // common["BM"]) * heads * batch,)
    forward_kernels().forward[grid](
        q=q, k=k, v=v, out=out, lse=lse, rest_logit=rest_logit, **_entries(one, q),
        **_stride("q", q), **_stride("k", k), **_stride("v", v), **_stride("o", out),
        heads=heads, group=heads // k.shape[1], **common, **one.switches(), num_stages=2,
    )  # fmt: skip


class _Backward:
    """Gradients of one class: the query kernel first, whose statistics the others read."""

    def __init__(
        self, shared: Shared, one: _Class, q: Tensor, k: Tensor, v: Tensor, out: Tensor, up: Tensor, lse: Tensor,
        up_lse: Tensor | None, rest_logit: Tensor,
    ) -> None:  # fmt: skip
        self.one, self.common, self.switches = one, _common(shared, one, q), one.switches()
        self.q, self.out, self.up, self.lse = (x[:, one.heads] for x in (q, out, up, lse))
        self.up_lse, self.rest_logit = (None if x is None else x[:, one.heads] for x in (up_lse, rest_logit))
        self.k, self.v = k[:, one.pairs], v[:, one.pairs]
        self.group = self.q.shape[1] // self.k.shape[1]
        # same strides as `lse`, which the kernels read with one batch stride
        self.delta, self.share, self.slope = (torch.empty_like(lse)[:, one.heads] for _ in range(3))

    def run(self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> list[Tensor | None]:
        """Write the gradients of q, k and v, return those of the class's vectors."""
        heads, pairs = self.one.heads, self.one.pairs
        self._query(grad_q[:, heads])
        self._near(grad_k[:, pairs], grad_v[:, pairs])
        return [*self._tail(), *self._region(), *self._sums()]

    def _launch(self, kernel: Any, programs: int, **more: Any) -> None:
        """Run a kernel with those of its arguments that all share."""
        given = {
            **self.common, **self.switches, **_entries(self.one, self.q), **_stride("q", self.q),
            **_stride("u", self.up), "q": self.q, "up": self.up, "lse": self.lse, "delta": self.delta,
            "share": self.share, "slope": self.slope, "group": self.group, "kv_heads": self.k.shape[1],
            "batch": self.q.shape[0], **more,
        }  # fmt: skip
        wanted = {name: given[name] for name in kernel.arg_names}
        kernel[(programs,)](**wanted, num_warps=self.common["num_warps"], num_stages=2)

    def _query(self, grad_q: Tensor) -> None:
        batch, heads, tokens, _ = self.q.shape
        self._launch(
            _backward_kernels().backward_query, -(-tokens // self.common["BM"]) * heads * batch,
            k=self.k, v=self.v, out=self.out, up_lse=self.q if self.up_lse is None else self.up_lse,
            rest_logit=self.rest_logit, grad_q=grad_q, heads=heads, UP_LSE=self.up_lse is not None,
            **_stride("k", self.k), **_stride("v", self.v), **_stride("o", self.out), **_stride("g", grad_q),
        )  # fmt: skip

    def _near(self, grad_k: Tensor, grad_v: Tensor) -> None:
        batch, pairs, tokens, _ = self.k.shape
        self._launch(
            _backward_kernels().backward_near, -(-tokens // self.common["BN"]) * pairs * batch,
            k=self.k, v=self.v, grad_k=grad_k, grad_v=grad_v, **_stride("k", self.k), **_stride("v", self.v),
            **_stride("gk", grad_k), **_stride("gv", grad_v),
        )  # fmt: skip

    def _parts(self, programs: int) -> int:
        """In how many parts the queries are split, so that there are enough programs."""
        tiles: int = -(-self.q.shape[2] // self.common["BM"])
        return max(1, min(ENOUGH_PROGRAMS // programs, tiles))

    def _tail(self) -> list[Tensor | None]:
        key, value, bias = self.one.vectors[:3]
        if key is None or value is None:
            return [None, None, None]
        batch, pairs, sets, width, _ = key.shape
        programs = -(-width // self.common["BN"]) * sets * pairs * batch
        parts = self._parts(programs)
        grads = [key.new_empty(parts, *key.shape, dtype=torch.float32) for _ in range(2)]
        grad_bias = key.new_empty(parts, *key.shape[:-1], dtype=torch.float32)
        self._launch(
            _backward_kernels().backward_tail, programs * parts, readers=self.one.seen.tail_readers,
            readers_b=_batch_stride(self.one.seen.tail_readers), grad_k=grads[0], grad_v=grads[1],
            grad_bias=grad_bias, parts=parts,
        )  # fmt: skip
        found = [grad.sum(0).to(key.dtype) for grad in grads]
        return [*found, None if bias is None else grad_bias.sum((0, 2))]

    def _region(self) -> list[Tensor | None]:
        key = self.one.vectors.region_key
        if key is None:
            return [None, None]
        batch, pairs, regions, _ = key.shape
        programs = -(-regions // self.common["BN"]) * pairs * batch
        parts = self._parts(programs)
        grads = [key.new_empty(parts, *key.shape, dtype=torch.float32) for _ in range(2)]
        self._launch(
            _backward_kernels().backward_region, programs * parts, readers=self.one.seen.region_readers,
            readers_b=_batch_stride(self.one.seen.region_readers), grad_k=grads[0], grad_v=grads[1], parts=parts,
        )  # fmt: skip
        return [grad.sum(0).to(key.dtype) for grad in grads]

    def _sums(self) -> list[Tensor | None]:
        """The sums' part of `slope` and `share`, by torch."""
        key_sum = self.one.vectors.key_sum
        if key_sum is None:
            return [None, None]
        batch, heads, tokens, dim = self.q.shape
        shape = (batch, heads // self.group, self.group, tokens, dim)
        found = []
        for weight, x in ((self.slope * self.common["scale"], self.q), (self.share, self.up)):
            # what stands in padding may be anything
            part = torch.where(weight[..., None] == 0, 0, weight[..., None] * x.float()).view(shape).sum(2)
            found.append(part if key_sum.shape[2] > 1 else part.sum(2, keepdim=True))
        return [*found]
