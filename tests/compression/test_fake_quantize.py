"""The operators of quantized models: rounding against an oracle, gradients against autograd, stored integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from trilevel.compression.fake_quantize import (
    dequantize,
    dequantize_4bit,
    fake_quantize,
    linear_4bit,
    pack_4bit,
    quantize_tensor,
    unpack_4bit,
    unpack_int8,
)
from trilevel.errors import ConfigError, ShapeError

OPS = torch.ops.trilevel


def oracle(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None) -> Tensor:
    """Number by number, from the docstring; numpy's float32 and its rounding to even."""
    out = torch.empty_like(x)
    for place in np.ndindex(*x.shape):
        own = () if axis is None else (place[axis],)
        s, z = np.float32(scale[own]), int(zero_point[own] if zero_point.ndim else zero_point)
        grid = min(quant_max, max(quant_min, int(np.round(np.float32(x[place]) / s)) + z))
        out[place] = float(np.float32(grid - z) * s)
    return out


CASES: dict[str, tuple[int | None, int, int]] = {
    "one_scale": (None, -128, 127),
    "one_scale_unsigned": (None, 0, 255),
    "first_axis": (0, -127, 127),
    "last_axis": (-1, 0, 255),
    "middle_axis": (1, -8, 7),
}


def drawn(case: str) -> tuple[Tensor, Tensor, Tensor, int, int, int | None]:
    axis, smallest, largest = CASES[case]
    x = torch.randn(3, 5, 7)
    size = () if axis is None else (x.shape[axis],)
    # a tenth of the numbers lies outside
    scale = (torch.rand(size) + 0.5) * 3.3 / (largest - smallest)
    middle = (largest + smallest) // 2 + 1
    return x, scale, torch.full(size, middle, dtype=torch.int32), smallest, largest, axis


@pytest.mark.parametrize("case", CASES)
def test_it_rounds_as_defined(case: str) -> None:
    arguments = drawn(case)
    out = fake_quantize(*arguments)
    assert torch.equal(out, oracle(*arguments))
    assert 0.01 < float((out - arguments[0]).abs().gt(arguments[1].max()).float().mean()) < 0.5


def test_ties_go_to_even_numbers() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75])
    assert fake_quantize(x, torch.tensor(0.5), torch.tensor(0), -8, 7).tolist() == [0.0, 1.0, 1.0, -0.0, -1.0]


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(2.0**-20, 2.0**20, width=32))
def test_twice_is_once_and_zero_stays(number: float, step: float) -> None:
    x, scale, zero = torch.tensor([number, 0.0]), torch.tensor(step), torch.tensor(3)
    once = fake_quantize(x, scale, zero, -128, 127)
    assert once[1] == 0
    torch.testing.assert_close(fake_quantize(once, scale, zero, -128, 127), once, rtol=1e-6, atol=0)


def test_bfloat16_is_rounded_in_float32() -> None:
    x, scale, zero, smallest, largest, _ = drawn("one_scale_unsigned")
    rest = (scale, zero, smallest, largest)
    out = fake_quantize(x.bfloat16(), *rest)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fake_quantize(x.bfloat16().float(), *rest).bfloat16())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula(case: str) -> None:
    x, scale, zero, smallest, largest, axis = drawn(case)
    x, scale = x.double().requires_grad_(), scale.double().requires_grad_()
    shape = [1] * 3
    if axis is not None:
        shape[axis] = -1
    wide, offset = scale.reshape(shape), zero.reshape(shape)
    quotient = x / wide
    # the operator's rule says inside or outside by the rounded integer
    grid = (quotient.detach().round() + offset).clamp(smallest, largest) - offset
    inside = (quotient.detach().round() - grid) == 0
    passed = torch.where(inside, quotient + (grid - quotient).detach(), grid) * wide
    weight = torch.randn_like(x)
    wanted = torch.autograd.grad((passed * weight).sum(), (x, scale))
    found = torch.autograd.grad((fake_quantize(x, scale, zero, smallest, largest, axis) * weight).sum(), (x, scale))
    step = math.sqrt(x.numel() / scale.numel() * largest)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1] / step)
    assert (found[0] == 0).any()


def test_gradient_equals_that_of_torch() -> None:
    x = (torch.randn(64) * 2).requires_grad_()
    # a power of two: torch multiplies by the inverse
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.25, 1, -8, 7)
    ours = fake_quantize(x, torch.tensor(0.25), torch.tensor(1), -8, 7)
    assert torch.equal(ours, theirs)
    weight = torch.randn(64)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), x) for y in (ours, theirs)), strict=True):
        assert torch.equal(one, other)


def test_no_gradient_where_none_is_wanted() -> None:
    scale = torch.tensor(0.1, requires_grad=True)
    fake_quantize(torch.randn(5), scale, torch.tensor(0), -8, 7).sum().backward()
    assert scale.grad is not None
    x = torch.randn(5, requires_grad=True)
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -8, 7).sum().backward()
    assert x.grad is not None


def weights_4bit() -> tuple[Tensor, Tensor]:
    return torch.randint(-8, 8, (5, 3, 32)), torch.rand(5, 3) + 0.1


@pytest.mark.parametrize("name", ["fake_quantize", "dequantize", "linear_4bit", "unpack_int8"])
def test_operators_are_registered_right(name: str) -> None:
    x, scale, zero, smallest, largest, axis = drawn("last_axis")
    q, scales = weights_4bit()
    arguments: dict[str, tuple[Any, ...]] = {
        "fake_quantize": (x.requires_grad_(), scale.requires_grad_(), zero, smallest, largest, axis),
        "dequantize": (torch.randint(-127, 128, (3, 5), dtype=torch.int8), torch.rand(5), 1),
        "linear_4bit": (torch.randn(2, 70, requires_grad=True), pack_4bit(q), scales, torch.randn(5)),
        "unpack_int8": (pack_4bit(q), torch.randint(1, 9, (5, 3), dtype=torch.uint8)),
    }
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).default, arguments[name], test_utils=tests)


def test_integers_of_8_bits_are_those_of_4_times_their_factor() -> None:
    q, _ = weights_4bit()
    factors = torch.randint(1, 9, (5, 3), dtype=torch.uint8)
    found = unpack_int8(pack_4bit(q), factors)
    assert found.dtype == torch.int8
    assert found.tolist() == [
        [int(value) * int(factor) for group, factor in zip(groups, own, strict=True) for value in group]
        for groups, own in zip(q, factors, strict=True)
    ]
    with pytest.raises(ShapeError, match=r"factors \(5, 2\); uint8 \(out, groups, group_size / 2\) and"):
        unpack_int8(pack_4bit(q), factors[:, :2])


def test_integers_are_those_behind_the_rounded_numbers() -> None:
    arguments = drawn("first_axis")
    integers = quantize_tensor(*arguments)
    assert integers.dtype == torch.int32
    centred = (integers - arguments[2][:, None, None]).to(torch.int8)
    assert torch.equal(dequantize(centred, arguments[1], axis=0), fake_quantize(*arguments))


def test_dequantize_has_the_type_of_its_scale() -> None:
    q = torch.tensor([[-127, 3], [5, 127]], dtype=torch.int8)
    assert torch.equal(dequantize(q, torch.tensor(0.5)), q.float() / 2)
    out = dequantize(q, torch.tensor([0.5, 0.25], dtype=torch.bfloat16), axis=-1)
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[-63.5, 0.75], [2.5, 31.75]]


def test_four_bits_come_back() -> None:
    q, scale = weights_4bit()
    packed = pack_4bit(q)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 3, 16)
    assert torch.equal(unpack_4bit(packed), q.to(torch.int8))
    # the first weight in the low half, 8 for 0
    assert int(packed[0, 0, 0]) == (int(q[0, 0, 0]) + 8) + 16 * (int(q[0, 0, 1]) + 8)
    assert torch.equal(dequantize_4bit(packed, scale, 70), (q * scale[..., None]).flatten(1)[:, :70])


def test_linear_of_four_bits() -> None:
    q, scale = weights_4bit()
    weight = (q * scale[..., None]).flatten(1)[:, :70]
    x, bias = torch.randn(2, 11, 70, requires_grad=True), torch.randn(5, requires_grad=True)
    found, wanted = linear_4bit(x, pack_4bit(q), scale, bias), F.linear(x, weight, bias)
    assert torch.equal(found, wanted)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (x, bias)) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(linear_4bit(x, pack_4bit(q), scale), F.linear(x, weight))


def test_it_stays_one_node_for_all_lengths() -> None:
    class Rounded(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -128, 127)

    dims = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Rounded(), (torch.randn(5, 3),), dynamic_shapes=dims, strict=False)
    assert [node.target for node in program.graph.nodes].count(OPS.fake_quantize.default) == 1
    x = torch.randn(13, 3)
    assert torch.equal(program.module()(x), Rounded()(x))


def test_errors_say_what_is_needed() -> None:
    x, one, zero = torch.randn(3, 5), torch.tensor(0.1), torch.tensor(0)
    with pytest.raises(ShapeError, match=r"scale has shape \(3,\); one number is needed with axis=None"):
        fake_quantize(x, torch.ones(3), zero, -8, 7)
    with pytest.raises(ShapeError, match=r"scale has shape \(3,\); \(5,\) is needed with axis=1"):
        fake_quantize(x, torch.ones(3), zero, -8, 7, axis=1)
    with pytest.raises(ShapeError, match=r"axis=2 is none of a tensor with 2 axes"):
        fake_quantize(x, torch.ones(3), zero, -8, 7, axis=2)
    with pytest.raises(ShapeError, match=r"zero_point has shape \(2,\); one number or \(3,\)"):
        fake_quantize(x, torch.ones(3), torch.zeros(2, dtype=torch.int32), -8, 7, axis=0)
    with pytest.raises(ShapeError, match=r"x has type torch\.int8; a floating-point type"):
        fake_quantize(x.to(torch.int8), one, zero, -8, 7)
    with pytest.raises(ConfigError, match="quant_min=7 must be below quant_max=7"):
        fake_quantize(x, one, zero, 7, 7)
    with pytest.raises(ShapeError, match=r"q has type torch\.float32; int8 or uint8"):
        dequantize(x, one)
    q, scale = weights_4bit()
    with pytest.raises(ShapeError, match="x has 3 features and the weight 3 groups of 32"):
        linear_4bit(torch.randn(2, 3), pack_4bit(q), scale)
    with pytest.raises(ShapeError, match=r"uint8 \(out, groups, group_size / 2\)"):
        linear_4bit(torch.randn(2, 96), q, scale)
