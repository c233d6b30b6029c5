"""Whether TensorRT takes a graph, and its engines; built and run by the user's own TensorRT.

TensorRT is NVIDIA's and comes without an extra: `tensorrt` where there is a GPU. To ask whether a graph parses, the
sibling for consumer GPUs is enough, and needs no GPU:

    pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trilevel.errors import ArtifactError, ConfigError, MissingExtraError, require

MODULES = ("tensorrt", "tensorrt_rtx_bindings")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What TensorRT made of a graph.

    Attributes:
        library, version: that parsed it.
        layers: of its network.
        inputs: shapes by name; -1 varies.
    """

    library: str
    version: str
    layers: int
    inputs: Mapping[str, Shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Shapes of one input that an engine serves: from `smallest` to `largest`, fastest at `usual`."""

    smallest: Shape
    usual: Shape
    largest: Shape


def check_tensorrt(path: Path) -> Parsed:
    """Parse an ONNX file; takes seconds and no GPU.

    TensorRT takes float32 and `portable` int8 (activations around 0); neither `cpu` int8 (with a zero point) nor 4-bit
    weights.

    Raises:
        MissingExtraError: there is no TensorRT.
        ArtifactError: it does not parse the graph; each reason is in the message.
    """
    trt = _tensorrt()
    _, network = _parse(trt, path)
    return Parsed(
        library=trt.__name__.removesuffix("_bindings"),
        version=trt.__version__,
        layers=network.num_layers,
        inputs=_inputs(network),
    )


def build_engine(path: Path, engine: Path, profiles: Mapping[str, Profile]) -> None:
    """Build an engine of an ONNX file for this machine's GPU and write it.

    Types are those of the graph: int8 products stay int8. An engine runs on the kind of GPU, and with the version of
    TensorRT, that it was built for; building takes minutes.

    Args:
        path: of the ONNX file.
        engine: to write.
        profiles: for every input of which an axis varies.

    Raises:
        MissingExtraError: there is no TensorRT.
        ConfigError: a profile is missing, names no input, or does not fit its input.
        ArtifactError: TensorRT does not parse the graph or build the engine.
    """
    trt = _tensorrt()
    builder, network = _parse(trt, path)
    _check_profiles(_inputs(network), profiles)
    config, shapes = builder.create_builder_config(), builder.create_optimization_profile()
    for name, own in profiles.items():
        shapes.set_shape(name, own.smallest, own.usual, own.largest)
    config.add_optimization_profile(shapes)
    _logger(trt).told.clear()
    built = builder.build_serialized_network(network, config)
    if built is None:
        reasons = "; ".join(_logger(trt).told)
        raise ArtifactError(f"TensorRT {trt.__version__} builds no engine of {path} ({reasons}).")
    engine.write_bytes(built)


def _tensorrt() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise MissingExtraError(f"{name} is installed and cannot be imported ({error}).") from error
    raise MissingExtraError(
        "there is no TensorRT. Install NVIDIA's (pip install tensorrt), or, to check graphs without a GPU: "
        "pip install --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings."
    )


@cache
def _logger(trt: Any) -> Any:
    """One for the process, as TensorRT keeps the first; it remembers errors in `told`."""

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.told: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.told.append(message.strip())

    return Errors()


def _parse(trt: Any, path: Path) -> tuple[Any, Any]:
    """A builder and the network of the graph."""
    builder = trt.Builder(_logger(trt))
    # types are then those of the graph; versions that know no others have no such flag
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, _logger(trt))
    if not parser.parse(_graph(path)):
        reasons = "; ".join(_reason(parser.get_error(index)) for index in range(parser.num_errors))
        raise ArtifactError(f"TensorRT {trt.__version__} does not parse {path} ({reasons}).")
    return builder, network


def _graph(path: Path) -> bytes:
    """The graph with tables dequantized before rows are read: TensorRT takes stored integers nowhere else.

    An engine's table is float then; the file's stays as it is.
    """
    onnx = require("onnx", extra="export")
    try:
        model = onnx.load(str(path))
    # protobuf's errors have classes of their own
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read ({error}). Export the model again.") from error
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    readers = {name: node for node in model.graph.node for name in node.input}
    for gather in [node for node in model.graph.node if node.op_type == "Gather"]:
        dequantize = readers.get(gather.output[0])
        if kinds.get(gather.input[0]) != onnx.TensorProto.INT8 or dequantize is None:
            continue
        table, rows = gather.input[0], dequantize.input[0]
        first, second = onnx.NodeProto(), onnx.NodeProto()
        first.CopyFrom(dequantize)
        second.CopyFrom(gather)
        first.input[0], first.output[0] = table, rows
        second.input[0], second.output[0] = rows, dequantize.output[0]
        gather.CopyFrom(first)
        dequantize.CopyFrom(second)
    data: bytes = model.SerializeToString()
    return data


def _reason(error: Any) -> str:
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}".rstrip(".")


def _inputs(network: Any) -> dict[str, Shape]:
    found = (network.get_input(index) for index in range(network.num_inputs))
    return {one.name: tuple(one.shape) for one in found}


def _check_profiles(shapes: Mapping[str, Shape], profiles: Mapping[str, Profile]) -> None:
    needed = {name for name, shape in shapes.items() if -1 in shape}
    if not needed <= set(profiles) <= set(shapes):
        raise ConfigError(f"profiles are given for {sorted(profiles)}; {sorted(needed)} need one.")
    for name, own in profiles.items():
        shape = shapes[name]
        given = (own.smallest, own.usual, own.largest)
        is_right = all(len(one) == len(shape) for one in given) and all(
            1 <= low <= usual <= high and (size == -1 or low == high == size)
            for size, low, usual, high in zip(shape, *given, strict=True)
        )
        if not is_right:
            raise ConfigError(f"the profile of {name!r} is {given}; three rising shapes that fit {shape} are needed.")
