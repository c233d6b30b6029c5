"""C++ kernels behind a plain C interface: near block, dense tail and folded remainder in one pass over the queries.

Tensors are read through their strides, and memory beyond inputs and outputs is O(threads * window + entries). The
backward pass computes probabilities again from the log-sum-exp and adds gradients up in a fixed order, so results do
not depend on the number of threads. `attention/library.py` says which library of `attention/native` runs.
Threads do not survive a fork: a forked child calls `torch.set_num_threads(1)` first, as for torch's own operators.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from trilevel.attention.call import Call, empty_output
from trilevel.attention.finite import sees_any
from trilevel.attention.geometry import make_geometry
from trilevel.attention.library import is_available, library
from trilevel.attention.memory import with_huge_pages
from trilevel.errors import ImplementationError

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MAX_DIM = 256
MAX_TOKENS = 2**30


class _Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    ]


class _Call(Structure):
    """`trilevel_call` of native/abi.h, field by field."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "tokens", "dim")),
        *((name, _Tensor) for name in ("query", "key", "value", "out")),
        *((name, c_void_p) for name in ("lse", "pool_weight", "score", "rope_cos", "rope_sin")),
        *((name, c_void_p) for name in ("forced", "valid", "segment")),
        *((name, c_int32) for name in ("rope_batch", "dtype")),
        ("split", c_int32 * 3),
        *((name, c_int32) for name in ("radius", "region_size", "num_regions", "num_global", "num_sinks", "chunk")),
        *((name, c_int32) for name in ("is_union", "has_gate_bias", "is_causal", "is_strict", "threads")),
        ("scale", c_float),
    ]


class _Grads(Structure):
    """`trilevel_grads` of native/abi.h."""

    _fields_ = [
        ("grad_out", _Tensor),
        *((name, c_void_p) for name in ("grad_lse", "query", "key", "value", "pool_weight", "score")),
    ]


def obstacle(call: Call) -> str | None:
    """Why the kernels cannot run a call, with what to do about it; None if they can."""
    tokens, dim = call.query.shape[2:]
    if call.query.device.type != "cpu":
        return f"tensors are on {call.query.device}; the kernels run on a CPU. Use impl='auto'."
    if call.query.dtype not in DTYPES:
        return f"the type is {call.query.dtype}; float32 and bfloat16 are built in. Convert, or use impl='blocked'."
    if isinstance(dim, int) and dim > MAX_DIM:
        return f"the head dimension is {dim}, at most {MAX_DIM} is built in. Use impl='blocked'."
    if isinstance(tokens, int) and tokens > MAX_TOKENS:
        return f"rows have {tokens} tokens, at most {MAX_TOKENS} can be counted. Split the rows."
    return None


def check(call: Call) -> None:
    """Raises:
    ImplementationError: the kernels cannot run this call.
    """
    reason = obstacle(call)
    if reason is not None:
        raise ImplementationError(f"impl='native': {reason}")


def suits(call: Call) -> bool:
    """Whether `impl="auto"` may choose the kernels for a call: they are built and run all of its heads."""
    return not call.has_strict_entries and obstacle(call) is None and is_available()


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """Outputs (batch, heads, tokens, dim), tokens before heads in memory, and log-sum-exp; gradients are not recorded.

    Raises:
        ImplementationError: the kernels are not built, or cannot run this call.
    """
    # before memory is taken for the outputs
    check(call)
    batch, heads, tokens, _ = call.query.shape
    out = with_huge_pages(empty_output(call.query))
    lse = call.query.new_empty(batch, heads, tokens, dtype=torch.float32) if call.needs_lse else None
    given = _Given(call, out, lse)
    _check(library().trilevel_forward(byref(given.struct)))
    if call.score is not None and call.split.global_ and not bool(call.score.isfinite().all()):
        _show_bad_scores(call, call.score, out, lse)
    return out, lse


def _show_bad_scores(call: Call, score: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """NaN in the global heads of every query that sees a token whose score is not finite; the kernels take it for 0."""
    geometry = make_geometry(
        score.shape[1],
        radius=0,
        valid=call.valid,
        segment=call.segment,
        num_segments=call.num_segments,
        is_causal=call.is_causal,
        device=score.device,
    )
    seen = sees_any(~score.isfinite(), geometry, is_causal=call.is_causal)
    seen = (seen if call.valid is None else seen & call.valid)[:, None]
    out[:, -call.split.global_ :].masked_fill_(seen[..., None], torch.nan)
    if lse is not None:
        lse[:, -call.split.global_ :].masked_fill_(seen, torch.nan)


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, Tensor]:
    """Gradients by the name of the call's tensor, from what `attend` gave (log-sum-exp needed) and their gradients."""
    given = _Given(call, out, lse)
    grad_out = _rows(grad_out)
    # kept alive: the struct holds its address
    slope = None if grad_lse is None else grad_lse.float().contiguous()
    given_by_name = {name: getattr(call, name) for name in ("query", "key", "value", "pool_weight", "score")}
    found = {
        name: with_huge_pages(torch.empty(x.shape, dtype=torch.float32)).zero_()
        for name, x in given_by_name.items()
        if x is not None
    }
    grads = _Grads(
        grad_out=_tensor(grad_out),
        grad_lse=None if slope is None else slope.data_ptr(),
        **{name: grad.data_ptr() for name, grad in found.items()},
    )
    _check(library().trilevel_backward(byref(given.struct), byref(grads)))
    return {name: grad.to(getattr(call, name).dtype) for name, grad in found.items()}


class _Given:
    """A call as the kernels get it, and the tensors that must stay alive meanwhile."""

    def __init__(self, call: Call, out: Tensor, lse: Tensor | None) -> None:
        levels = call.levels
        batch, heads, tokens, dim = call.query.shape
        query, key, value = (_rows(x) for x in (call.query, call.key, call.value))
        pool_weight, score = (_as(x, torch.float32) for x in (call.pool_weight, call.score))
        forced, valid = (_as(x, torch.bool) for x in (call.forced, call.valid))
        segment = _as(call.segment, torch.int64)
        cos, sin = (None, None) if call.rotary is None else (_as(x, torch.float32) for x in call.rotary)
        self._alive = (query, key, value, out, lse, pool_weight, score, forced, valid, segment, cos, sin)
        self.struct = _Call(
            batch=batch,
            heads=heads,
            kv_heads=key.shape[1],
            tokens=tokens,
            dim=dim,
            query=_tensor(query),
            key=_tensor(key),
            value=_tensor(value),
            out=_tensor(out),
            lse=_address(lse),
            pool_weight=_address(pool_weight),
            score=_address(score),
            rope_cos=_address(cos),
            rope_sin=_address(sin),
            forced=_address(forced),
            valid=_address(valid),
            segment=_address(segment),
            rope_batch=1 if cos is None else cos.shape[0],
            dtype=DTYPES[query.dtype],
            split=(c_int32 * 3)(*call.split),
            radius=min(levels.radius, tokens),
            # of one token more than there are: no region is complete, as with any larger size
            region_size=min(levels.region_size or 0, tokens + 1),
            num_regions=min(levels.num_regions or 0, tokens),
            num_global=min(levels.num_global_tokens, tokens),
            num_sinks=min(levels.num_sinks, tokens),
            chunk=min(levels.chunk, tokens + 1),
            is_union=levels.union,
            has_gate_bias=levels.selection_gradient == "gate",
            is_causal=call.is_causal,
            is_strict=levels.mode == "strict",
            threads=torch.get_num_threads(),
            scale=call.scale,
        )


def _rows(x: Tensor) -> Tensor:
    """The tensor itself when its features lie side by side, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).contiguous()


def _tensor(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(status: int) -> None:
    if status:
        reason = library().trilevel_error().decode()
        raise MemoryError(reason) if "bad_alloc" in reason else RuntimeError(f"native attention: {reason}")
