"""Multi-level attention as one operator: what `torch.compile` sees, and what gives the native kernels gradients.

Traced into, the blocks of a dynamic length cost the compiler minutes of symbolic arithmetic; as one operator a graph
serves every length and compiles in seconds. The backward pass computes the forward again, so nothing of size
tokens x window is kept. `torch.export` does not use it unless `impl="native"` is asked for: an exported graph consists
of torch's own operators.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from trilevel.attention.call import Call, empty_output
from trilevel.attention.impl import blocked, native
from trilevel.attention.levels import LevelRatio, Levels

# tensors that can have a gradient come first
TENSORS = ("query", "key", "value", "pool_weight", "score", "region_gate", "forced", "valid", "segment")
DIFFERENTIABLE = 6


def attend(call: Call, impl: Literal["auto", "blocked", "native"]) -> tuple[Tensor, Tensor | None]:
    """An implementation as one node of a graph, with gradients; `auto` is decided when the node runs."""
    levels = call.levels
    # the native backward pass starts from the log-sum-exp
    needs_lse = call.needs_lse or impl != "blocked"
    out, lse = _attention(
        *(getattr(call, name) for name in TENSORS),
        list(levels.ratio.shares),
        levels.mode,
        levels.selection_gradient,
        [levels.window, levels.num_global_tokens, levels.num_sinks, call.num_segments],
        [levels.union, call.is_causal, needs_lse],
        call.scale,
        levels.region_size,
        levels.num_regions,
        levels.selection_chunk,
        impl,
    )
    return out, lse if call.needs_lse else None


def _call(
    tensors: list[Tensor | None],
    ratio: list[float],
    mode: str,
    selection_gradient: str,
    sizes: list[int],
    flags: list[bool],
    scale: float,
    region_size: int | None,
    num_regions: int | None,
    selection_chunk: int | None,
) -> Call:
    window, num_global_tokens, num_sinks, num_segments = sizes
    union, is_causal, needs_lse = flags
    levels = Levels(
        ratio=LevelRatio(*ratio),
        mode=mode,  # type: ignore[arg-type]  # the operator's schema knows plain strings only
        window=window,
        region_size=region_size,
        num_regions=num_regions,
        num_global_tokens=num_global_tokens,
        num_sinks=num_sinks,
        union=union,
        selection_gradient=selection_gradient,  # type: ignore[arg-type]
        selection_chunk=selection_chunk,
    )
    given: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
    split = levels.ratio.split(given["query"].shape[1], given["key"].shape[1])
    return Call(
        **given,
        levels=levels,
        split=split,
        num_segments=num_segments,
        is_causal=is_causal,
        scale=scale,
        needs_lse=needs_lse,
    )


def _is_native(impl: str, call: Call) -> bool:
    return impl == "native" or (impl == "auto" and native.suits(call))


@torch.library.custom_op("trilevel::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_weight: Tensor | None,
    score: Tensor | None,
    region_gate: Tensor | None,
    forced: Tensor | None,
    valid: Tensor | None,
    segment: Tensor | None,
    ratio: list[float],
    mode: str,
    selection_gradient: str,
    sizes: list[int],
    flags: list[bool],
    scale: float,
    region_size: int | None,
    num_regions: int | None,
    selection_chunk: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    tensors = [query, key, value, pool_weight, score, region_gate, forced, valid, segment]
    rest = (ratio, mode, selection_gradient, sizes, flags, scale, region_size, num_regions, selection_chunk)
    call = _call(tensors, *rest)
    with torch.no_grad():
        out, lse = (native if _is_native(impl, call) else blocked).attend(call)
    made = empty_output(query)
    if out.stride() != made.stride() or out._is_view():
        out = made.copy_(out)
    return out, query.new_empty(0) if lse is None else lse.contiguous()


@_attention.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_lse = rest[12][2]
    shape = query.shape[:3] if needs_lse else (0,)
    kind = torch.promote_types(query.dtype, torch.float32) if needs_lse else query.dtype
    return empty_output(query), query.new_empty(shape, dtype=kind)


@torch.library.custom_op("trilevel::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_weight: Tensor | None,
    score: Tensor | None,
    region_gate: Tensor | None,
    forced: Tensor | None,
    valid: Tensor | None,
    segment: Tensor | None,
    ratio: list[float],
    mode: str,
    selection_gradient: str,
    sizes: list[int],
    flags: list[bool],
    scale: float,
    region_size: int | None,
    num_regions: int | None,
    selection_chunk: int | None,
    impl: str,
) -> list[Tensor]:
    given = [query, key, value, pool_weight, score, region_gate]
    places = [i for i, x in enumerate(given) if x is not None]
    rest = (ratio, mode, selection_gradient, sizes, flags, scale, region_size, num_regions, selection_chunk)
    if out is not None and lse is not None:
        call = _call([*given, forced, valid, segment], *rest)
        # 0 * NaN is NaN: where a row saw something that is not finite, `blocked` hides it from the rows that did not
        if _is_native(impl, call) and bool(out.sum().isfinite()):
            grads = native.backward(call, out, lse, grad_out, grad_lse)
            return [grads[TENSORS[place]] for place in places]

    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        tensors = [*given, forced, valid, segment]
        for place, leaf in zip(places, leaves, strict=True):
            tensors[place] = leaf
        out, lse = blocked.attend(_call(tensors, *rest))
        return (out,) if lse is None else (out, lse)

    with torch.enable_grad():
        # inside an operator autograd is switched off; torch.func brings its own
        pull = torch.func.vjp(forward, *(given[place] for place in places))[1]
        found = pull((grad_out,) if grad_lse is None else (grad_out, grad_lse))
    return [x.contiguous() for x in found]


@_attention_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in rest[:DIFFERENTIABLE] if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.rest = inputs[len(TENSORS) :]
    made = (None, None) if ctx.rest[-1] == "blocked" else output
    ctx.save_for_backward(*inputs[: len(TENSORS)], *made)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    needs_lse = ctx.rest[4][2]
    *given, out, lse = ctx.saved_tensors
    found = iter(_attention_backward(grad_out, grad_lse if needs_lse else None, out, lse, *given, *ctx.rest))
    tensors = [None if x is None else next(found) for x in given[:DIFFERENTIABLE]]
    return (*tensors, *[None] * (len(TENSORS) - DIFFERENTIABLE + len(ctx.rest)))


_attention.register_autograd(_backward, setup_context=_keep)
