"""What the operators of quantized models become in ONNX, so that runtimes compute in integers.

    program = torch.onnx.export(model, inputs, dynamo=True, opset_version=20, dynamic_shapes=...,
                                custom_translation_table=translation_table())
    store_transposed(program.model)

Rounded inputs become QuantizeLinear and DequantizeLinear, stored weights DequantizeLinear of int8 initialisers. Both
runtimes fuse that: ONNX Runtime to MatMulIntegerToFloat, OpenVINO to a FullyConnected of I8. What is computed with in 8
bits and stored in 4 is taken apart by arithmetic, once, when a runtime loads the file. Weights of 4 bits alone become
ONNX Runtime's MatMulNBits, which OpenVINO reads as well. With weights alone quantized both runtimes round activations
on their own, unless `session.qdq_matmulnbits_accuracy_level` is "1" (ONNX Runtime) and
`DYNAMIC_QUANTIZATION_GROUP_SIZE` is 0 (OpenVINO).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trilevel.compression.fake_quantize import NIBBLE_ZERO
from trilevel.errors import ConfigError, require

EXTRA = "export"
CONTRIB = "com.microsoft"
FLOAT, INT8 = 1, 3
"""Types in ONNX's numbers."""
_GRIDS = {(-128, 127), (0, 255)}


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of the operators of `trilevel.compression.fake_quantize` for `torch.onnx.export`, opset 20.

    The export raises a `ConfigError` of its own cause for weights that are float masters still: `freeze` first.

    Raises:
        MissingExtraError: onnxscript is not installed.
    """
    op = require("onnxscript", extra=EXTRA).opset20
    ours = torch.ops.trilevel

    def fake_quantize(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, axis: Any = None) -> Any:
        if (quant_min, quant_max) not in _GRIDS or axis is not None:
            raise ConfigError(
                f"fake_quantize to {quant_min}..{quant_max} with axis={axis} has no equal in ONNX, which saturates at "
                "-128..127 and 0..255. Weights are exported as stored integers: call freeze(model) first."
            )
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def dequantize(q: Any, scale: Any, axis: Any = None) -> Any:
        return op.DequantizeLinear(q, scale) if axis is None else op.DequantizeLinear(q, scale, axis=axis)

    def unpack_int8(packed: Any, factors: Any) -> Any:
        rows, groups, half = (int(size) for size in packed.shape)
        both = op.Cast(packed, to=FLOAT)
        high = op.Floor(op.Div(both, 16.0))
        halves = op.Concat(*(op.Unsqueeze(part, [3]) for part in (op.Sub(both, op.Mul(high, 16.0)), high)), axis=3)
        q = op.Sub(op.Reshape(halves, [rows, groups, 2 * half]), float(NIBBLE_ZERO))
        scaled = op.Mul(q, op.Unsqueeze(op.Cast(factors, to=FLOAT), [2]))
        return op.Cast(op.Reshape(scaled, [rows, -1]), to=INT8)

    def linear_4bit(x: Any, packed: Any, scale: Any, bias: Any = None) -> Any:
        rows, _, half = (int(size) for size in packed.shape)
        sizes = {"K": int(x.shape[-1]), "N": rows, "bits": 4, "block_size": 2 * half}
        product = _matmul_nbits()(x, packed, scale, **sizes)
        return product if bias is None else op.Add(product, bias)

    return {
        ours.fake_quantize.default: fake_quantize,
        ours.dequantize.default: dequantize,
        ours.unpack_int8.default: unpack_int8,
        ours.linear_4bit.default: linear_4bit,
    }


def _matmul_nbits() -> Any:
    """The operator, which is not among ONNX's own: what this package uses of its schema."""
    defs = require("onnx", extra=EXTRA).defs
    values = require("onnxscript", extra=EXTRA).values
    schema = defs.OpSchema(
        "MatMulNBits",
        CONTRIB,
        1,
        inputs=[
            defs.OpSchema.FormalParameter("A", "T1"),
            defs.OpSchema.FormalParameter("B", "T2"),
            defs.OpSchema.FormalParameter("scales", "T1"),
        ],
        outputs=[defs.OpSchema.FormalParameter("Y", "T1")],
        type_constraints=[("T1", ["tensor(float)", "tensor(float16)"], ""), ("T2", ["tensor(uint8)"], "")],
        attributes=[
            defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.INT, "") for name in ("K", "N", "bits", "block_size")
        ],
    )
    return values.Op(values.Opset(CONTRIB, 1), "MatMulNBits", schema)


def store_transposed(model: Any) -> int:
    """Store the int8 weights of linear maps `(in, out)`, as MatMul reads them; the function stays.

    torch keeps them `(out, in)` and transposes behind DequantizeLinear, where ONNX Runtime takes the product for a
    float one.

    Args:
        model: an `onnx_ir.Model`, changed; `program.model` of what `torch.onnx.export` returns.

    Returns:
        The number of weights; one that something else reads too is left as it is.
    """
    ir = require("onnx_ir", extra=EXTRA)
    changed = 0
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "Transpose" else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        weight, output = source.inputs[0], source.outputs[0]
        if len(weight.uses()) > 1 or len(output.uses()) > 1:
            continue
        if weight.const_value is not None and weight.const_value.numpy().ndim == 2:
            stored = np.ascontiguousarray(weight.const_value.numpy().T)
            weight.const_value = ir.tensor(stored, name=weight.name)
            weight.shape = output.shape = ir.Shape(stored.shape)
        elif weight.const_value is None and "axis" in source.attributes:
            # taken apart as the file is loaded, transposed then as well
            turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
            source.replace_input_with(0, turned.outputs[0])
            model.graph.insert_before(source, turned)
            output.shape = None
        else:
            continue
        axis = source.attributes.get("axis")
        if axis is not None:
            source.attributes["axis"] = ir.AttrInt64("axis", 1 - axis.as_int() % 2)
        node.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        changed += 1
    return changed
