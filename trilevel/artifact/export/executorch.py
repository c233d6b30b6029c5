"""A float module as an ExecuTorch program for phones and boards; its products run in XNNPACK (decision 0015)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trilevel.artifact.export.onnx import exportable
from trilevel.errors import ConfigError, require

EXTRA = "executorch"


def export_executorch(module: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Write `module` to `path` (.pte) for inputs of exactly these shapes: pad what is shorter, with a mask.

    Lowering takes a minute a layer or two.

    Args:
        module: in float32; takes `inputs` in their order.
        inputs: an example.
        path: of the file.

    Raises:
        ConfigError: the module is quantized, or has attention that cannot be exported.
        MissingExtraError: executorch is not installed.
    """
    exir = require("executorch.exir", extra=EXTRA)
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", extra=EXTRA)
    # its own parts and torch warn of each other
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(exportable(module), tuple(inputs.values()), strict=False)
        own = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("trilevel.")}
        if own:
            raise ConfigError(
                f"ExecuTorch has no {', '.join(sorted(own))}. Give the float model, not the quantized one."
            )
        edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
        path.write_bytes(edge.to_executorch().buffer)
