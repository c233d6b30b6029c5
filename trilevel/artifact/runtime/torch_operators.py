"""The operators of exported graphs in torch, each as the ONNX specification (opset 20) has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trilevel.compression.fake_quantize import linear_4bit
from trilevel.errors import ArtifactError, require

Made = Tensor | Sequence[Tensor]


def _cast(x: Tensor, *, to: int, **_: Any) -> Tensor:
    numpy_type = require("onnx", extra="export").helper.tensor_dtype_to_np_dtype(to)
    return x.to(getattr(torch, str(numpy_type)))


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _div(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


def _gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    return x[(slice(None),) * (axis % x.ndim) + (index.long(),)]


def _gather_elements(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: Any
) -> Tensor:
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _pad(
    x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant"
) -> Tensor:
    if mode != "constant":
        raise ArtifactError(f"Pad with mode={mode!r} is not known here. Use another runtime.")
    sizes, around = pads.tolist(), [(0, 0)] * x.ndim
    for place, axis in enumerate(range(x.ndim) if axes is None else axes.tolist()):
        around[axis] = sizes[place], sizes[place + len(sizes) // 2]
    # torch begins with the last axis
    flat = [size for pair in reversed(around) for size in pair]
    return F.pad(x, flat, value=0 if value is None else value.item())


def _range(start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Made]:
    def reduced(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        wanted = [] if axes is None else axes.tolist()
        if not wanted and noop_with_empty_axes:
            return x
        return function(x, wanted or list(range(x.ndim)), keepdim=bool(keepdims))

    return reduced


def _reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    sizes = [x.shape[place] if size == 0 and not allowzero else size for place, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    first, last = starts.tolist(), ends.tolist()
    along = list(range(len(first))) if axes is None else axes.tolist()
    by = [1] * len(first) if steps is None else steps.tolist()
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        places = range(*slice(start, end, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, min(places.start, x.shape[axis]), len(places))
        else:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


def _split(
    x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> Sequence[Tensor]:
    each = -(-x.shape[axis] // (num_outputs or 1)) if sizes is None else sizes.tolist()
    parts: Sequence[Tensor] = x.split(each, axis)
    return parts


def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in axes.flatten().tolist()):
        x = x.unsqueeze(axis)
    return x


def _top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, **_: Any) -> Sequence[Tensor]:
    # of equal values the first is chosen, which torch.topk does not promise
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, int(k)), places.narrow(axis, 0, int(k))


def _transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(list(perm) if perm is not None else list(reversed(range(x.ndim))))


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """`values`, one for each index of an axis of `x`, or a single one."""
    if values.ndim == 0:
        return values
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _quantize(x: Tensor, scale: Tensor, zero: Tensor, *, axis: int = 1, **_: Any) -> Tensor:
    limits = torch.iinfo(zero.dtype)
    grid = (x / _along(scale, x, axis)).round() + _along(zero, x, axis)
    return grid.clamp(limits.min, limits.max).to(zero.dtype)


def _dequantize(q: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, **_: Any) -> Tensor:
    wide = q.to(scale.dtype)
    if zero is not None:
        wide = wide - _along(zero, q, axis).to(scale.dtype)
    return wide * _along(scale, q, axis)


def _matmul_4bit(x: Tensor, packed: Tensor, scale: Tensor, **_: Any) -> Tensor:
    return linear_4bit(x, packed, scale.reshape(packed.shape[:2]))


def _gemm(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    product = alpha * ((x.T if transA else x) @ (y.T if transB else y))
    return product if bias is None else product + beta * bias


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    pads, half = options.get("pads", [0] * (2 * (x.ndim - 2))), x.ndim - 2
    if pads[:half] != pads[half:] or options.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ArtifactError("Conv that pads unevenly is not known here. Use another runtime.")
    convolve: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[half]
    known = {"stride": "strides", "dilation": "dilations", "groups": "group"}
    return convolve(
        x, weight, bias, padding=pads[:half], **{own: options[name] for own, name in known.items() if name in options}
    )


OPERATORS: dict[str, Callable[..., Made]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _conv,
    "Cos": torch.cos,
    "DequantizeLinear": _dequantize,
    "Div": _div,
    "Equal": torch.eq,
    "Exp": torch.exp,
    "Expand": _expand,
    "Floor": torch.floor,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "MatMulNBits": _matmul_4bit,
    "Max": lambda *parts: reduce(torch.maximum, parts),
    "Min": lambda *parts: reduce(torch.minimum, parts),
    "Mod": lambda x, y, fmod=0: torch.fmod(x, y) if fmod else torch.remainder(x, y),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pad": _pad,
    "Pow": torch.pow,
    "QuantizeLinear": _quantize,
    "Range": _range,
    "Reciprocal": torch.reciprocal,
    "ReduceL2": _reduced(lambda x, axes, keepdim: torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
