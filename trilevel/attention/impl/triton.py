"""NVIDIA GPUs: one fused Triton kernel for near block, dense tail, region summaries and remainder; four backward ones.

What the heads see is built by torch (`entries.py`, `triton_seen.py`), so the gradients of pooling, selection and sums
are torch's; the kernels are one autograd function of q, k, v, tail tokens, summaries and sums. They read and write
through strides and keep O(tokens) between the passes. Logits and sums are float32, products of float32 in full
precision. Tokens and counts may change from call to call without compiling again. It is not traced by `torch.compile`,
and there is no second derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilevel.attention.call import Call
from trilevel.attention.entries import Entries, global_entries, local_entries, regional_entries
from trilevel.attention.finite import hide_nonfinite
from trilevel.attention.geometry import Geometry, make_geometry
from trilevel.attention.impl.triton_launch import Fused, Shared, forward_kernels
from trilevel.attention.impl.triton_seen import Seen, Vectors, seen_by
from trilevel.attention.strict import strict_global, strict_regional
from trilevel.errors import ImplementationError, MissingExtraError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_DIM = 256
OLDEST_CAPABILITY = (8, 0)


def attend(call: Call) -> tuple[Tensor, Tensor | None]:
    """Outputs (batch, heads, tokens, dim) and, if the call needs it, log-sum-exp (batch, heads, tokens).

    Raises:
        ImplementationError: the tensors, the machine or the installation are none that Triton can serve.
    """
    missing = obstacle(call)
    if missing is not None:
        raise ImplementationError(missing)
    return _attend(call)


def obstacle(call: Call) -> str | None:
    """Why the call cannot run here, with what to do about it; None if it can."""
    if torch.compiler.is_compiling():
        return "impl='triton' is not traced by torch.compile and torch.export. Use impl='auto' in what you compile."
    x = call.query
    if x.dtype not in DTYPES:
        return f"impl='triton' computes in float32, bfloat16 and float16, got {x.dtype}. Cast, or use impl='blocked'."
    if x.shape[3] > LARGEST_DIM:
        return f"impl='triton' takes heads of up to {LARGEST_DIM} dims, got {x.shape[3]}. Use impl='blocked'."
    try:
        is_interpreted = forward_kernels().INTERPRETED
    except MissingExtraError as error:
        return f"impl='triton': {error} Or use impl='blocked'."
    if is_interpreted:
        return None
    if x.device.type != "cuda":
        return (
            f"impl='triton' needs CUDA tensors, got {x.device}. Move them to a GPU, use impl='blocked', or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter (slow, for tests)."
        )
    found = torch.cuda.get_device_capability(x.device)
    if found < OLDEST_CAPABILITY:
        wanted = ".".join(map(str, OLDEST_CAPABILITY))
        return f"impl='triton' needs compute capability {wanted}, {x.device} has {found[0]}.{found[1]}. Use 'blocked'."
    return None


def _attend(call: Call) -> tuple[Tensor, Tensor | None]:
    geometry = None
    if not _sees_windows_alone(call):
        geometry = make_geometry(
            call.query.shape[2],
            radius=call.levels.radius,
            valid=call.valid,
            segment=call.segment,
            num_segments=call.num_segments,
            is_causal=call.is_causal,
            device=call.query.device,
        )
    bad = None
    if geometry is not None:
        call, bad = hide_nonfinite(call, geometry)
    out, lse = _calibrated(call, geometry) if call.levels.mode == "calibrated" else _strict(call, geometry)
    if bad is not None:
        out = torch.where(bad[:, None, :, None], torch.nan, out)
        lse = torch.where(bad[:, None], torch.nan, lse)
    return out, lse if call.needs_lse else None


def _sees_windows_alone(call: Call) -> bool:
    """Whether positions say all, so that nothing but the kernel runs."""
    local = call.levels.mode == "strict" and call.split.local == call.query.shape[1]
    return local and call.valid is None and call.segment is None


def _calibrated(call: Call, geometry: Geometry | None) -> tuple[Tensor, Tensor]:
    assert geometry is not None
    classes = []
    for index, heads in enumerate(call.split):
        if heads:
            _, k, v, weight = _heads(call, index)
            if index == 0:
                entries = local_entries(call, geometry, k, v)
            else:
                entries = (regional_entries if index == 1 else global_entries)(call, geometry, k, v, weight)
            classes.append((heads, *seen_by(call, geometry, entries, k, v)))
    return _fused(call, call.query, call.key, call.value, classes)


def _strict(call: Call, geometry: Geometry | None) -> tuple[Tensor, Tensor]:
    parts = []
    for index, heads in enumerate(call.split):
        if not heads:
            continue
        q, k, v, weight = _heads(call, index)
        if index == 0:
            parts.append(_fused(call, q, k, v, [(heads, *seen_by(call, geometry, Entries(), k, v))]))
            continue
        assert geometry is not None
        q, k, v = (x.float() for x in (q, k, v))
        found = (
            strict_regional(call, geometry, q, k, v, weight) if index == 1 else strict_global(call, geometry, q, k, v)
        )
        parts.append(_without_padding(call, found[0].to(call.query.dtype), found[1]))
    return parts[0] if len(parts) == 1 else (torch.cat([x[0] for x in parts], 1), torch.cat([x[1] for x in parts], 1))


def _without_padding(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    if call.valid is None:
        return out, lse
    return torch.where(call.valid[:, None, :, None], out, 0), torch.where(call.valid[:, None], lse, -torch.inf)


def _heads(call: Call, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and pooling weights of a head class (0 local, 1 regional, 2 global)."""
    group = call.query.shape[1] // call.key.shape[1]
    start = sum(call.split[:index])
    stop = start + call.split[index]
    pairs = slice(start // group, stop // group)
    weight = None if call.pool_weight is None else call.pool_weight[pairs]
    return call.query[:, start:stop], call.key[:, pairs], call.value[:, pairs], weight


def _fused(
    call: Call, q: Tensor, k: Tensor, v: Tensor, classes: list[tuple[int, Seen, Vectors]]
) -> tuple[Tensor, Tensor]:
    shared = Shared(
        radius=call.levels.radius,
        is_causal=call.is_causal,
        scale=call.scale,
        heads=tuple(heads for heads, _, _ in classes),
        seen=tuple(seen for _, seen, _ in classes),
    )
    flat = [x for _, _, vectors in classes for x in vectors]
    out, lse = Fused.apply(shared, q, k, v, *flat)  # type: ignore[no-untyped-call]
    return out, lse
