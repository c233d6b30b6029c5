"""Operators of quantized models, each one node of a traced graph: rounding in floating point, and stored integers.

`round(x / scale)` written by hand is exported as float arithmetic, which every runtime then runs in float without a
word. As operators of their own they are translated to what runtimes fuse (`trilevel.artifact.export.quantized`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trilevel.errors import ConfigError, ShapeError

SMALLEST_SCALE = 2.0**-100
NIBBLE_ZERO = 8
"""What stands for 0 in a packed 4-bit weight, as in ONNX Runtime's MatMulNBits."""
LARGEST_FACTOR = 8
"""Of a group of 4-bit weights that is computed with in 8 bits: two neighbours are at most 128 together, see
`QuantizedLinear`."""


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Round `x` to an integer grid and back: `(clamp(round(x / scale) + zero_point) - zero_point) * scale`.

    Ties go to the even number, as in ONNX. The gradient of `x` passes straight through where the rounded integer is in
    the range and is 0 elsewhere. A scale that requires a gradient gets LSQ's (Esser et al. 2019, arXiv 1902.08153):
    `round(x / scale) - x / scale` inside, the distance of the clamped end to the zero point outside, times
    `1 / sqrt(elements per scale * quant_max)`. Computed in float32 (float64 for float64 input), returned in the type
    of `x`.

    Args:
        x: of any shape.
        scale: positive; one number, or `(x.shape[axis],)`.
        zero_point: integers; one number or of the shape of `scale`.
        quant_min: smallest integer of the grid.
        quant_max: largest one.
        axis: the axis of `x` that has a scale of its own for each index; None for one scale.

    Raises:
        ShapeError: `scale` or `zero_point` does not fit, or `x` holds integers.
        ConfigError: the grid is empty.

    >>> fake_quantize(torch.tensor([-9.0, 0.26, 0.74]), torch.tensor(0.5), torch.tensor(0), -4, 3)
    tensor([-2.0000,  0.5000,  0.5000])
    """
    _check_scale(x, scale, axis)
    if zero_point.ndim and zero_point.shape != scale.shape:
        raise ShapeError(
            f"zero_point has shape {tuple(zero_point.shape)}; one number or {tuple(scale.shape)} is needed."
        )
    if not x.is_floating_point():
        raise ShapeError(f"x has type {x.dtype}; a floating-point type is needed. Stored integers go to dequantize.")
    if quant_min >= quant_max:
        raise ConfigError(f"quant_min={quant_min} must be below quant_max={quant_max}.")
    rounded: Tensor = _fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)
    return rounded


def quantize_tensor(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """The integers behind `fake_quantize` of the same arguments, as int32; no gradient."""
    _check_scale(x, scale, axis)
    grid = (_quotient(x.detach(), scale, axis).round() + _along(zero_point, x, axis)).clamp(quant_min, quant_max)
    return grid.to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """Stored integers times their scale, in the type of `scale`.

    Args:
        q: int8 or uint8 of any shape, zero point 0.
        scale: one number, or `(q.shape[axis],)`.
        axis: the axis of `q` that has a scale of its own for each index; None for one scale.

    Raises:
        ShapeError: `scale` does not fit, or `q` holds no integers of 8 bits.

    >>> dequantize(torch.tensor([[2, -3]], dtype=torch.int8), torch.tensor([0.5]), axis=0)
    tensor([[ 1.0000, -1.5000]])
    """
    if q.dtype not in (torch.int8, torch.uint8):
        raise ShapeError(f"q has type {q.dtype}; int8 or uint8 is needed.")
    _check_scale(q, scale, axis)
    values: Tensor = _dequantize(q, scale, axis)
    return values


def linear_4bit(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` with a weight of 4 bits, `(..., in)` to `(..., out)`; no gradient of the weight.

    Args:
        x: `(..., in)`.
        packed: uint8 `(out, groups, group_size / 2)`, two weights a byte, see `pack_4bit`.
        scale: `(out, groups)`.
        bias: `(out,)` or None.

    Raises:
        ShapeError: `x` needs more or fewer groups than `packed` has, or `scale` does not fit.
    """
    if packed.ndim != 3 or packed.dtype != torch.uint8 or scale.shape != packed.shape[:2]:
        raise ShapeError(
            f"packed has shape {tuple(packed.shape)} and type {packed.dtype}, scale {tuple(scale.shape)}; uint8 "
            "(out, groups, group_size / 2) and (out, groups) are needed."
        )
    if -(-x.shape[-1] // (2 * packed.shape[2])) != packed.shape[1]:
        raise ShapeError(
            f"x has {x.shape[-1]} features and the weight {packed.shape[1]} groups of {2 * packed.shape[2]}."
        )
    out: Tensor = _linear_4bit(x, packed, scale, bias)
    return out


def pack_4bit(q: Tensor) -> Tensor:
    """Integers -8..7 `(out, groups, group_size)` as bytes `(out, groups, group_size / 2)`, the earlier in the low half.

    The layout of ONNX Runtime's MatMulNBits, where 8 stands for 0.
    """
    nibbles = (q.to(torch.int16) + NIBBLE_ZERO).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_4bit(packed: Tensor) -> Tensor:
    """What `pack_4bit` packed, int8 `(out, groups, group_size)`."""
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return halves.to(torch.int8) - NIBBLE_ZERO


def dequantize_4bit(packed: Tensor, scale: Tensor, in_features: int) -> Tensor:
    """The weight `(out, in_features)` that `packed` and `scale` of `linear_4bit` stand for."""
    values = unpack_4bit(packed).to(_compute_type(scale)) * scale[..., None].to(_compute_type(scale))
    return values.flatten(1)[:, :in_features].to(scale.dtype)


def unpack_int8(packed: Tensor, factors: Tensor) -> Tensor:
    """Integers of 8 bits that are stored in 4: those of `pack_4bit` times the whole number of their group.

    Args:
        packed: uint8 `(out, groups, group_size / 2)`, see `pack_4bit`.
        factors: uint8 `(out, groups)`, 1 to `LARGEST_FACTOR`.

    Returns:
        int8 `(out, groups * group_size)`, -64..56.

    Raises:
        ShapeError: `factors` does not fit.
    """
    if packed.ndim != 3 or packed.dtype != torch.uint8 or factors.shape != packed.shape[:2]:
        raise ShapeError(
            f"packed has shape {tuple(packed.shape)} and type {packed.dtype}, factors {tuple(factors.shape)}; uint8 "
            "(out, groups, group_size / 2) and (out, groups) are needed."
        )
    q: Tensor = _unpack_int8(packed, factors)
    return q


def _check_scale(x: Tensor, scale: Tensor, axis: int | None) -> None:
    if axis is None:
        if scale.ndim:
            raise ShapeError(f"scale has shape {tuple(scale.shape)}; one number is needed with axis=None.")
    elif not -x.ndim <= axis < x.ndim:
        raise ShapeError(f"axis={axis} is none of a tensor with {x.ndim} axes.")
    elif scale.ndim != 1 or scale.shape[0] != x.shape[axis]:
        raise ShapeError(f"scale has shape {tuple(scale.shape)}; ({x.shape[axis]},) is needed with axis={axis}.")


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`values` in the type of the computation, shaped so that they meet `axis` of `x`."""
    values = values.to(_compute_type(x))
    if axis is None or values.ndim == 0:
        return values
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _quotient(x: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return x.to(_compute_type(x)) / _along(scale, x, axis).clamp(min=SMALLEST_SCALE)


@torch.library.custom_op("trilevel::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    zero = _along(zero_point, x, axis)
    grid = _quotient(x, scale, axis).round_().add_(zero).clamp_(quant_min, quant_max)
    return grid.sub_(zero).mul_(_along(scale, x, axis).clamp(min=SMALLEST_SCALE)).to(x.dtype)


@_fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, ctx.quant_min, ctx.quant_max, ctx.axis = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    zero = _along(zero_point, x, ctx.axis)
    quotient = _quotient(x, scale, ctx.axis)
    grid = quotient.round() + zero
    is_inside = (grid >= ctx.quant_min) & (grid <= ctx.quant_max)
    of_x = torch.where(is_inside, gradient, 0) if ctx.needs_input_grad[0] else None
    of_scale = None
    if ctx.needs_input_grad[1]:
        # inside, grid - zero - quotient is the rounding error; outside, the clamped end alone
        ends = grid.clamp(ctx.quant_min, ctx.quant_max) - zero
        slope = (ends - torch.where(is_inside, quotient, 0)) * gradient
        axes = [] if ctx.axis is None else [ctx.axis % x.ndim]
        others = [axis for axis in range(x.ndim) if axis not in axes]
        summed = slope.sum(others) if others else slope
        step = math.sqrt(max(1, x.numel() // max(1, scale.numel())) * ctx.quant_max)
        of_scale = (summed / step).to(scale.dtype)
    return of_x, of_scale, None, None, None, None


_fake_quantize.register_autograd(_straight_through, setup_context=_save)


@torch.library.custom_op("trilevel::dequantize", mutates_args=())
def _dequantize(q: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    wide = _compute_type(scale)
    return (q.to(wide) * _along(scale, q, axis).to(wide).clamp(min=SMALLEST_SCALE)).to(scale.dtype)


@_dequantize.register_fake
def _(q: Tensor, scale: Tensor, axis: int | None) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@torch.library.custom_op("trilevel::unpack_int8", mutates_args=())
def _unpack_int8(packed: Tensor, factors: Tensor) -> Tensor:
    return (unpack_4bit(packed) * factors[..., None].to(torch.int8)).flatten(1)


@_unpack_int8.register_fake
def _(packed: Tensor, factors: Tensor) -> Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1] * packed.shape[2]), dtype=torch.int8)


@torch.library.custom_op("trilevel::linear_4bit", mutates_args=())
def _linear_4bit(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, dequantize_4bit(packed, scale, x.shape[-1]), bias)


@_linear_4bit.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, bias = inputs
    ctx.in_features = x.shape[-1]
    ctx.has_bias = bias is not None
    ctx.save_for_backward(packed, scale)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale = ctx.saved_tensors
    of_x = gradient @ dequantize_4bit(packed, scale, ctx.in_features) if ctx.needs_input_grad[0] else None
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return of_x, None, None, of_bias


_linear_4bit.register_autograd(_linear_backward, setup_context=_keep_weight)
