"""Attention as one operator of the native kernels, in place of some hundred of ONNX's own: for ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import require

DOMAIN, NAME = "trilevel", "MultiLevelAttention"
"""As native/ort_op.h names it."""
_FLOATS, _FLAGS, _WHOLE = "T", "B", "I"
_INPUTS = {
    "query": _FLOATS,
    "key": _FLOATS,
    "value": _FLOATS,
    "pool_weight": _FLOATS,
    "score": _FLOATS,
    "forced": _FLAGS,
    "valid": _FLAGS,
    "segment": _WHOLE,
}
_REQUIRED = ("query", "key", "value")
_SIZES = ("local", "regional", "global", "radius", "region_size", "num_global_tokens", "num_sinks")


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation of `trilevel::attention` for `torch.onnx.export`, opset 20.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
    """
    op = require("onnxscript", extra="export").opset20
    operator = _operator()

    def turned(x: Any) -> Any:
        # heads before tokens or behind them; runtimes take two turns behind each other away
        return op.Transpose(x, perm=[0, 2, 1, 3])

    def attention(
        query: Any,
        key: Any,
        value: Any,
        pool_weight: Any,
        score: Any,
        _region_gate: Any,
        forced: Any,
        valid: Any,
        segment: Any,
        ratio: Sequence[float],
        _mode: str,
        _selection_gradient: str,
        sizes: Sequence[int],
        _flags: Sequence[bool],
        scale: float,
        region_size: int | None,
        *_: Any,
    ) -> Any:
        split = LevelRatio(*ratio).split(int(query.shape[1]), int(key.shape[1]))
        window, num_global_tokens, num_sinks, _num_segments = sizes
        out = operator(
            *map(turned, (query, key, value)),
            pool_weight,
            score,
            forced,
            valid,
            segment,
            local=split.local,
            regional=split.regional,
            **{"global": split.global_},
            radius=Levels(window=window).radius,
            region_size=region_size or 0,
            num_global_tokens=num_global_tokens,
            num_sinks=num_sinks,
            scale=scale,
        )
        # nobody reads the second output, the log-sum-exp
        return turned(out), op.Constant(value_floats=[])

    return {torch.ops.trilevel.attention.default: attention}


def _operator() -> Any:
    defs = require("onnx", extra="export").defs
    values = require("onnxscript", extra="export").values
    kinds, options = defs.OpSchema.AttrType, defs.OpSchema.FormalParameterOption
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        1,
        inputs=[
            defs.OpSchema.FormalParameter(
                name, kind, param_option=options.Single if name in _REQUIRED else options.Optional
            )
            for name, kind in _INPUTS.items()
        ],
        outputs=[defs.OpSchema.FormalParameter("out", _FLOATS)],
        type_constraints=[
            (_FLOATS, ["tensor(float)"], ""),
            (_FLAGS, ["tensor(bool)"], ""),
            (_WHOLE, ["tensor(int64)"], ""),
        ],
        attributes=[
            *(defs.OpSchema.Attribute(name, kinds.INT, "") for name in _SIZES),
            defs.OpSchema.Attribute("scale", kinds.FLOAT, ""),
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), NAME, schema)
