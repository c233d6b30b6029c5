"""`multi_level_attention`: validates, chooses an implementation, runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from trilevel.attention import library, op
from trilevel.attention.call import Call
from trilevel.attention.cost import cheaper
from trilevel.attention.finite import finite_only, sees_any
from trilevel.attention.geometry import make_geometry
from trilevel.attention.impl import blocked, graph, native, reference, triton
from trilevel.attention.levels import HeadSplit, LevelRatio, Levels
from trilevel.attention.rope import rotate
from trilevel.errors import ConfigError, ImplementationError, ShapeError

Impl = Literal["auto", "reference", "blocked", "native", "triton", "graph"]
IMPLEMENTATIONS: dict[str, Callable[[Call], tuple[Tensor, Tensor | None]]] = {
    "reference": reference.attend,
    "blocked": blocked.attend,
    "native": native.attend,
    "triton": triton.attend,
    "graph": graph.attend,
}
_log = logging.getLogger(__name__)


@overload
def multi_level_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    levels: Levels,
    pool_weight: Tensor | None = ...,
    global_score: Tensor | None = ...,
    global_prior: Tensor | None = ...,
    global_forced: Tensor | None = ...,
    region_gate: Tensor | None = ...,
    padding_mask: Tensor | None = ...,
    segment_ids: Tensor | None = ...,
    num_segments: int | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    rotary: tuple[Tensor, Tensor] | None = ...,
    impl: Impl = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def multi_level_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    levels: Levels,
    pool_weight: Tensor | None = ...,
    global_score: Tensor | None = ...,
    global_prior: Tensor | None = ...,
    global_forced: Tensor | None = ...,
    region_gate: Tensor | None = ...,
    padding_mask: Tensor | None = ...,
    segment_ids: Tensor | None = ...,
    num_segments: int | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    rotary: tuple[Tensor, Tensor] | None = ...,
    impl: Impl = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def multi_level_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    levels: Levels,
    pool_weight: Tensor | None = None,
    global_score: Tensor | None = None,
    global_prior: Tensor | None = None,
    global_forced: Tensor | None = None,
    region_gate: Tensor | None = None,
    padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    impl: Impl = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose heads are local, regional or global, in O(tokens) memory.

    Heads stand in the order local, regional, global, as many of each as `levels.ratio` gives. A head's output is
    `softmax_e(scale * q . key_e + c_e) @ value_e` over its entries e. With visible(i) the real tokens of the segment
    of i (causal: up to i) and near(i) those of them with |i - j| <= w, a `calibrated` head sees near(i) and

    - local: the first `num_sinks` tokens and one remainder entry, the plain mean of all else;
    - regional: one summary a region with c = log(tokens of the region outside near(i)); causal: complete regions
      only, and a remainder for the tokens in none;
    - global: the global tokens outside near(i) and a remainder; with `union` region summaries in its place.

    The counts partition visible(i): no token counts twice. A `strict` head sees: local near(i) only; regional, pooled
    queries against pooled keys of the regions, handed to the region's tokens; global, global tokens among themselves,
    every other token gets 0 and a log-sum-exp of -inf.

    Args:
        query: (batch, heads, tokens, dim).
        key: (batch, kv_heads, tokens, dim); heads are a multiple of kv_heads (grouped queries).
        value: like key.
        levels: the levels.
        pool_weight: (kv_heads, dim), u_h: a region is pooled with softmax(u_h . k_j); None is the plain mean.
        global_score: (batch, tokens) learned score of a token as global token.
        global_prior: (batch, tokens) or (tokens,) prior added to the score (titles, lead sentences, flags).
        global_forced: (batch, tokens) bool, always selected, at most `num_global_tokens` a segment.
        region_gate: (batch, tokens, regional heads), strict only: regional output is multiplied by 2 sigmoid(gate).
        padding_mask: (batch, tokens) bool, True = padding (as `key_padding_mask` of `torch.nn.MultiheadAttention`).
        segment_ids: (batch, tokens) integers that never decrease along a row: packed sequences.
        num_segments: how many segments ids may name; required under `torch.compile` and `torch.export`.
        is_causal: a token sees the past and itself; `calibrated` only.
        scale: of the logits, default 1 / sqrt(dim).
        rotary: cosines and sines of `rope.rotary_tables`: query and key are rotated first. `native` does so while it
            reads them, without a copy (inference).
        impl: `auto`, `native` (C++ on a CPU), `triton` (CUDA), `blocked` (portable), `graph` (what is exported: no
            gradients of the selection, right padding only) or `reference` (O(tokens^2), defines the truth).
        return_lse: return (output, log-sum-exp (batch, heads, tokens)) as well.

    Returns:
        (batch, heads, tokens, dim); padding rows are 0 with log-sum-exp -inf.

    Raises:
        ShapeError: shapes, types or ids do not fit.
        ConfigError: levels cannot do what is asked.
        ImplementationError: unknown `impl`, or one that cannot run this call here.

    Source: this project's own; the closest published form is DeepSeek-V4's one softmax over window and compressed
    entries, which has no log-counts, remainder or head classes.

    >>> q = k = v = torch.ones(1, 4, 10, 8)
    >>> multi_level_attention(q, k, v, levels=Levels(window=3, region_size=4, num_global_tokens=2)).shape
    torch.Size([1, 4, 10, 8])
    """
    call = validated(
        query, key, value, levels, pool_weight, global_score, global_prior, global_forced, region_gate, padding_mask,
        segment_ids, num_segments, is_causal, scale, return_lse,
    )  # fmt: skip
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ImplementationError(f"impl={impl!r} is unknown; use 'auto' or one of {sorted(IMPLEMENTATIONS)}.")
    is_dense = _runs_dense(call)
    name = _cheapest(call) if impl == "auto" else impl
    if rotary is not None:
        _check_rotary(call, *rotary)
        call = replace(call, rotary=rotary)
        if is_dense or not _rotates_itself(name, call):
            query, key = (rotate(x, *rotary) for x in (query, key))
            call = replace(call, query=query, key=key, rotary=None)
    if is_dense:
        if impl == "graph" and not return_lse:
            return graph.dense(call)
        if impl == "auto" and not return_lse:
            return dense_attention(call)
        call = _as_dense(call)
    out, lse = _run(name, call)
    return out if lse is None or not return_lse else (out, lse)


def _rotates_itself(impl: Impl, call: Call) -> bool:
    is_own_call = not (call.has_strict_entries or torch.compiler.is_compiling() or _needs_gradients(call))
    return impl == "native" and is_own_call


def _run(impl: Impl, call: Call) -> tuple[Tensor, Tensor | None]:
    local = call.split.local
    if impl == "native" and call.has_strict_entries:
        native.check(call)
        # strict's other heads are small dense attention, which torch's own products run
        parts = [_run("blocked", _heads(call, local, HeadSplit(0, call.split.regional, call.split.global_)))]
        if local:
            parts.insert(0, _run("native", _heads(call, 0, HeadSplit(local, 0, 0))))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 1) if call.needs_lse else None
    is_traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if impl == "auto" or (impl == "blocked" and is_traced):
        return op.attend(call, impl)
    if impl == "native" and (torch.compiler.is_compiling() or _needs_gradients(call)):
        return op.attend(call, impl)
    return IMPLEMENTATIONS[impl](call)


def _heads(call: Call, start: int, split: HeadSplit) -> Call:
    """The call with a run of its query heads alone."""
    group = call.query.shape[1] // call.key.shape[1]
    stop = start + sum(split)
    pairs = slice(start // group, stop // group)
    return replace(
        call,
        query=call.query[:, start:stop],
        key=call.key[:, pairs],
        value=call.value[:, pairs],
        pool_weight=None if call.pool_weight is None else call.pool_weight[pairs],
        score=call.score if split.global_ else None,
        region_gate=call.region_gate if split.regional else None,
        levels=replace(call.levels, ratio=LevelRatio(*split)),
        split=split,
    )


def _needs_gradients(call: Call) -> bool:
    given = (call.query, call.key, call.value, call.pool_weight, call.score)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def _cheapest(call: Call) -> Impl:
    """The implementation that `auto` runs; `auto` again where the graph's node decides."""
    if torch.compiler.is_compiling():
        # an exported graph consists of torch's own operators
        return "blocked" if torch.compiler.is_exporting() else "auto"
    if call.query.is_cuda:
        missing = triton.obstacle(call)
        _say_once(f"CUDA tensors run by {'triton' if missing is None else 'blocked: ' + missing}")
        return "triton" if missing is None else "blocked"
    missing, status = native.obstacle(call), library.status()
    if missing is not None:
        _say_once(f"impl='auto' runs blocked: {missing}")
        return "blocked"
    _say_once(f"impl='auto' runs {status.active or 'blocked'} on a CPU: {status.reason}")
    # a calibration times forward passes alone
    if status.active is None or _needs_gradients(call):
        return "native" if status.active else "blocked"
    query = call.query
    chosen = cheaper(call.levels, tuple(query.shape), call.key.shape[1], query.dtype, call.is_causal)
    if chosen == "blocked":
        _say_once("impl='auto' runs blocked on a CPU where this machine's calibration predicts it to be faster")
    return chosen


def _runs_dense(call: Call) -> bool:
    """Whether the function asked for is dense attention: by `dense_below`, or because the window covers the input."""
    tokens = call.query.shape[2]
    if not isinstance(tokens, int):
        return False
    below = call.levels.dense_below is not None and tokens < call.levels.dense_below
    covered = call.levels.mode == "calibrated" and call.levels.radius >= tokens - 1
    if below or covered:
        _say_dense(tokens)
    return below or covered


@cache
def _say_once(message: str) -> None:
    _log.info(message)


def _say_dense(tokens: int) -> None:
    if not torch.compiler.is_compiling():
        _say_once(f"inputs of {tokens} tokens run as dense attention (window covers them, or dense_below)")


def _as_dense(call: Call) -> Call:
    """The same call with a window that covers everything in local heads."""
    levels = replace(
        call.levels, mode="calibrated", ratio=LevelRatio(1, 0, 0), window=2 * call.query.shape[2] + 1, union=False,
        num_sinks=0,
    )  # fmt: skip
    return replace(call, levels=levels, split=HeadSplit(call.query.shape[1], 0, 0), score=None, region_gate=None)


def dense_attention(call: Call) -> Tensor:
    """Dense attention of a call by torch, with masks only where something is masked; levels and scores are ignored."""
    if call.valid is None and call.segment is None and not call.is_causal:
        return _sdpa(call, None)
    tokens = call.query.shape[2]
    call, bad, bad_query = finite_only(replace(call, score=None, region_gate=None))
    mask = None if call.valid is None else call.valid[:, None, None, :]
    if call.segment is not None:
        same = call.segment[:, None, :, None] == call.segment[:, None, None, :]
        mask = same if mask is None else same & mask
    if mask is not None and call.is_causal:
        mask = mask & torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    if mask is not None and (call.is_causal or call.segment is not None):
        # a padding query sees itself alone, so that no row is empty
        mask = mask | torch.eye(tokens, dtype=torch.bool, device=mask.device)
    out = _sdpa(call, mask)
    geometry = make_geometry(
        tokens,
        radius=0,
        valid=call.valid,
        segment=call.segment,
        num_segments=call.num_segments,
        is_causal=call.is_causal,
        device=out.device,
    )
    seen = sees_any(bad, geometry, is_causal=call.is_causal) | bad_query
    out = torch.where(seen[:, None, :, None], torch.nan, out)
    return out if call.valid is None else torch.where(call.valid[:, None, :, None], out, 0)


def dense_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    is_causal: bool = False,
) -> Call:
    """A validated call for `dense_attention`; arguments as in `multi_level_attention`."""
    local = Levels(ratio=LevelRatio(1, 0, 0))
    return validated(
        query, key, value, local, None, None, None, None, None, padding_mask, segment_ids, num_segments, is_causal,
        None, False,
    )  # fmt: skip


def _sdpa(call: Call, mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=mask,
        is_causal=call.is_causal and mask is None,
        scale=call.scale,
        enable_gqa=call.key.shape[1] != call.query.shape[1],
    )


def validated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Levels,
    pool_weight: Tensor | None,
    global_score: Tensor | None,
    global_prior: Tensor | None,
    global_forced: Tensor | None,
    region_gate: Tensor | None,
    padding_mask: Tensor | None,
    segment_ids: Tensor | None,
    num_segments: int | None,
    is_causal: bool,
    scale: float | None,
    return_lse: bool,
) -> Call:
    """The arguments of `multi_level_attention` as a call, or the error that says what is wrong with them."""
    _check_qkv(query, key, value)
    for name, given in (
        ("key", key),
        ("value", value),
        ("pool_weight", pool_weight),
        ("global_score", global_score),
        ("global_prior", global_prior),
        ("global_forced", global_forced),
        ("region_gate", region_gate),
        ("padding_mask", padding_mask),
        ("segment_ids", segment_ids),
    ):
        if given is not None and given.device != query.device:
            raise ShapeError(f"{name} is on {given.device}, query on {query.device}; move {name} there.")
    if is_causal and levels.mode == "strict":
        raise ConfigError("mode='strict' is bidirectional, got is_causal=True. Use Levels(mode='calibrated').")
    if is_causal and levels.region_size is None and (levels.ratio.regional or levels.union):
        raise ConfigError(
            f"causal attention cannot know the length that num_regions={levels.num_regions} divides. "
            "Use region_size=..., num_regions=None."
        )
    batch, heads, tokens, dim = query.shape
    split = levels.ratio.split(heads, key.shape[1])
    if region_gate is not None and levels.mode != "strict":
        raise ConfigError("region_gate belongs to mode='strict'; pass None.")
    _check_shape("pool_weight", pool_weight, (key.shape[1], dim))
    _check_shape("region_gate", region_gate, (batch, tokens, split.regional))
    for name, given in (
        ("global_score", global_score),
        ("global_forced", global_forced),
        ("padding_mask", padding_mask),
        ("segment_ids", segment_ids),
    ):
        _check_shape(name, given, (batch, tokens))
    for name, given in (("padding_mask", padding_mask), ("global_forced", global_forced)):
        if given is not None and given.dtype != torch.bool:
            raise ShapeError(f"{name} must be bool (True = {name.split('_')[-1]}), got {given.dtype}; call .bool().")
    segment, count = _segments(segment_ids, num_segments)
    valid = None if padding_mask is None else ~padding_mask
    score = _score(global_score, global_prior, valid, (batch, tokens))
    if score is None and levels.selection_gradient == "gate":
        score = query.new_zeros(batch, tokens)
    if global_forced is not None:
        forced = global_forced if valid is None else global_forced & valid
        _check_forced(forced, segment, count, levels.num_global_tokens)
        global_forced = forced
    return Call(
        query=query, key=key, value=value, levels=levels, split=split, pool_weight=pool_weight, score=score,
        forced=global_forced, region_gate=region_gate, valid=valid, segment=segment, num_segments=count,
        is_causal=is_causal, scale=dim**-0.5 if scale is None else scale, needs_lse=return_lse,
    )  # fmt: skip


def _check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ShapeError(f"{name} must be (batch, heads, tokens, dim), got shape {tuple(x.shape)}.")
        if not x.dtype.is_floating_point or x.dtype != query.dtype:
            raise ShapeError(f"{name} must be floating point like query ({query.dtype}), got {x.dtype}.")
    if key.shape != value.shape:
        raise ShapeError(f"key {tuple(key.shape)} and value {tuple(value.shape)} must have one shape.")
    batch, heads, tokens, dim = query.shape
    for name, size in (("row", batch), ("head", key.shape[1]), ("token", tokens), ("dimension", dim)):
        if isinstance(size, int) and size < 1:
            raise ShapeError(
                f"query {tuple(query.shape)}, key {tuple(key.shape)} have no {name}; at least one is needed."
            )
    if (key.shape[0], key.shape[2], key.shape[3]) != (batch, tokens, dim) or heads % key.shape[1]:
        raise ShapeError(
            f"query {tuple(query.shape)} needs key and value of shape (batch={batch}, a divisor of {heads} heads, "
            f"tokens={tokens}, dim={dim}), got {tuple(key.shape)}."
        )


def _check_rotary(call: Call, cos: Tensor, sin: Tensor) -> None:
    batch, _, tokens, dim = call.query.shape
    for name, x in (("cos", cos), ("sin", sin)):
        if tuple(x.shape) not in ((1, tokens, dim // 2), (batch, tokens, dim // 2)) or dim % 2:
            raise ShapeError(
                f"rotary {name} must have shape (1 or {batch}, {tokens}, {dim} / 2), got {tuple(x.shape)}. "
                "Make both with trilevel.attention.rope.rotary_tables."
            )
    if cos.shape != sin.shape:
        raise ShapeError(f"rotary cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must have one shape.")


def _check_shape(name: str, given: Tensor | None, wanted: tuple[int, ...]) -> None:
    if given is not None and tuple(given.shape) != wanted:
        raise ShapeError(f"{name} must have shape {wanted}, got {tuple(given.shape)}.")


def _segments(segment_ids: Tensor | None, num_segments: int | None) -> tuple[Tensor | None, int]:
    if segment_ids is None:
        return None, 1
    if segment_ids.dtype.is_floating_point or segment_ids.dtype == torch.bool:
        raise ShapeError(f"segment_ids must be integers, got {segment_ids.dtype}; call .long().")
    if torch.compiler.is_compiling():
        if num_segments is None:
            raise ConfigError("num_segments is needed with segment_ids under torch.compile and torch.export.")
        return segment_ids.long(), num_segments
    if (segment_ids[:, 1:] < segment_ids[:, :-1]).any() or (segment_ids < 0).any():
        raise ShapeError("segment_ids must be >= 0 and never decrease along a row; sort the packed sequences.")
    highest = int(segment_ids.max()) + 1
    if num_segments is not None and highest > num_segments:
        raise ShapeError(f"segment_ids name {highest} segments, num_segments={num_segments} allows fewer.")
    return segment_ids.long(), highest if num_segments is None else num_segments


def _score(score: Tensor | None, prior: Tensor | None, valid: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    if prior is not None:
        if tuple(prior.shape) not in (shape, shape[1:]):
            raise ShapeError(f"global_prior must have shape {shape} or {shape[1:]}, got {tuple(prior.shape)}.")
        prior = prior.expand(shape)
        score = prior if score is None else score + prior
    if score is not None and valid is not None:
        score = torch.where(valid, score, 0)
    return score


def _check_forced(forced: Tensor, segment: Tensor | None, num_segments: int, limit: int) -> None:
    if torch.compiler.is_compiling():
        return
    group = torch.zeros_like(forced, dtype=torch.long) if segment is None else segment
    count = forced.new_zeros(forced.shape[0], num_segments, dtype=torch.long).scatter_add(1, group, forced.long())
    most = int(count.max())
    if most > limit:
        raise ShapeError(
            f"global_forced marks {most} tokens in one segment, num_global_tokens={limit} holds fewer. "
            "Raise num_global_tokens or force fewer."
        )
