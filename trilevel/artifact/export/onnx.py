"""A module to one ONNX file that ONNX Runtime, OpenVINO and TensorRT's parser read, for every batch and length."""

from __future__ import annotations

import copy
import importlib
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.artifact.export import attention
from trilevel.artifact.export.quantized import store_transposed, translation_table
from trilevel.artifact.manifest import Tensors
from trilevel.attention.layer import MultiLevelAttention
from trilevel.errors import ConfigError, require

OPSET = 20
"""Later ones make an `Attention` operator of dense attention, whose masks ONNX Runtime 1.32 mishandles."""

REFUSED = ("NonZero", "Attention")
"""Operators that break a runtime: TensorRT has no NonZero."""

_LARGEST_CONSTANT = 1024
"""Numbers in a constant that is computed while exporting; runtimes compute larger ones when they load the file."""

_DYNAMIC = torch.export.Dim.AUTO


def exportable(module: nn.Module, *, is_native: bool = False) -> nn.Module:
    """A copy in evaluation mode whose attention runs in operators that every runtime has, or as one of the kernels'.

    Raises:
        ConfigError: a layer has levels that cannot be exported.
    """
    twin = copy.deepcopy(module).eval()
    for name, part in twin.named_modules():
        if isinstance(part, MultiLevelAttention):
            _check_layer(name, part)
            part.impl = "native" if is_native else "graph"
    return twin


def _check_layer(name: str, layer: MultiLevelAttention) -> None:
    levels = layer.levels
    given = {
        "is_causal=True": layer.is_causal,
        "mode='strict'": levels is not None and levels.mode == "strict",
        "union=True": levels is not None and levels.union,
        "num_regions": levels is not None and levels.region_size is None and layer.head_split.regional > 0,
        "selection_gradient='gate'": levels is not None and levels.selection_gradient == "gate",
    }
    wrong = [what for what, is_given in given.items() if is_given]
    if wrong:
        raise ConfigError(
            f"{name} has {', '.join(wrong)}, which cannot be exported. Train or convert with mode='calibrated', "
            "region_size and without union."
        )


def export_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    axes: Mapping[str, Sequence[int | str]],
    path: Path,
    *,
    output: str | Sequence[str],
    is_native: bool = False,
) -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    """Write `module` to `path`; weights that are stored as integers stay integers.

    Args:
        module: takes `inputs` in their order and returns one tensor, or a tuple of several.
        inputs: an example; axes that vary must have a size above 1.
        axes: names of the axes that vary and sizes of the others, for every input and output.
        path: of the file.
        output: name of what the module returns; names of several.
        is_native: attention with levels becomes one operator of the native kernels, which ONNX Runtime alone can run.

    Returns:
        Inputs and outputs as the manifest lists them.

    Raises:
        ConfigError: the module has attention that cannot be exported, or the graph an operator that breaks a runtime.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    require("onnx", extra="export")
    require("onnxscript", extra="export")
    names, outputs = list(inputs), [output] if isinstance(output, str) else list(output)
    shapes = tuple(
        {place: _DYNAMIC for place, axis in enumerate(axes[name]) if isinstance(axis, str)} for name in names
    )
    twin = exportable(module, is_native=is_native)
    table = translation_table() | (attention.translation_table() if is_native else {})
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            twin,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=outputs,
            custom_translation_table=table,
            verbose=False,
            optimize=False,
        )
        optimize(program.model)
        found = twin(*inputs.values())
    kinds = {node.op_type for node in program.model.graph}
    if kinds & set(REFUSED):
        raise ConfigError(f"the graph holds {sorted(kinds & set(REFUSED))}, which break a runtime; it is not written.")
    store_transposed(program.model)
    shorten(program.model)
    # one file: whoever copies it has all of it
    program.save(str(path), external_data=False)
    given = {name: _tensors(inputs[name], axes[name]) for name in names}
    made = [found] if isinstance(found, Tensor) else found
    return given, {name: _tensors(tensor, axes[name]) for name, tensor in zip(outputs, made, strict=True)}


def optimize(model: Any) -> None:
    """What `torch.onnx.export` does by default, but masks of a fixed length stay the few operators they are.

    Of the model of `torch.onnx.export(..., optimize=False)`. Computed beforehand masks were a third of the bytes of an
    image classifier of 196 tokens.
    """
    passes = importlib.import_module("onnx_ir.passes.common")
    optimizer = importlib.import_module("onnxscript.optimizer")
    uint8 = importlib.import_module("onnx_ir").DataType.UINT8
    optimizer.optimize_ir(
        model,
        input_size_limit=_LARGEST_CONSTANT,
        output_size_limit=_LARGEST_CONSTANT,
        # weights that are stored in 4 bits stay so
        should_fold=lambda node: False if node.inputs and getattr(node.inputs[0], "dtype", None) == uint8 else None,
    )
    # what blocks share, whatever its size
    passes.DeduplicateInitializersPass(size_limit=sys.maxsize)(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def shorten(model: Any) -> None:
    """Take out what runtimes do not read: a small file is mostly that.

    Where each operator came from (paths of the machine that exports), names of operators, and the shapes and long names
    of what is computed. Inputs, outputs and weights keep theirs.
    """
    graph = model.graph
    made = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    for value in (*made, *graph.initializers.values()):
        # runtimes find the one, and read the other off the stored tensor
        value.type, value.shape = None, None
    values = [*graph.inputs, *graph.initializers.values(), *made, *graph.outputs]
    for part in (model, graph, *graph, *values):
        part.metadata_props.clear()
        part.doc_string = None
    for node in graph:
        node.name = ""
    # a name is free only when nobody has it: first all become new ones
    taken = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    names = (name for name in map("v{}".format, itertools.count()) if name not in taken)
    for value, name in zip(made, names, strict=False):
        value.name = name


def _tensors(example: Tensor, axes: Sequence[int | str]) -> Tensors:
    return Tensors(dtype=str(example.dtype).removeprefix("torch."), axes=tuple(axes))


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own parts and of packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
