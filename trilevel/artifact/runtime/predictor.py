"""What every runtime is: arrays in by name, arrays out by name; and the check of inputs that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import Artifact, Tensors
from trilevel.artifact.probe import Arrays
from trilevel.errors import ArtifactError, ConfigError, InputError
from trilevel.routing.steps import rows_at_once

Precision = Literal["float32", "bfloat16"]
Runtime = Literal["onnxruntime", "openvino", "torch"]


class Predictor(Protocol):
    """A graph that is ready to run.

    Attributes:
        runtime: its name.
        version: of the runtime.
        precision: of what is not quantized.
    """

    runtime: str
    version: str
    precision: Precision

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name.

        Raises:
            InputError: an input is missing, unknown, or of another type or shape.
        """
        ...

    def kernels(self) -> Mapping[str, str]:
        """What is executed: the kind of each operator with its precision, by the operator's name."""
        ...


def check_options(threads: int | None, precision: str) -> None:
    """Raise `ConfigError` if an option of a runtime is out of range."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads} must be >= 1; None takes one for each core.")
    if precision not in get_args(Precision):
        raise ConfigError(f"precision={precision!r} is unknown; known are {', '.join(get_args(Precision))}.")


def check_inputs(wanted: Mapping[str, Tensors], given: Arrays) -> None:
    """Raise `InputError` unless `given` are the graph's inputs, with one size for each axis of one name."""
    if set(given) != set(wanted):
        raise InputError(f"inputs {sorted(given)} were given; the graph takes {sorted(wanted)}.")
    sizes: dict[str, int] = {}
    for name, tensor in wanted.items():
        array = given[name]
        shape = f"({', '.join(map(str, tensor.axes))})"
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(tensor.dtype):
            kind = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"input {name!r} is {kind}; {tensor.dtype} {shape} is needed.")
        is_right = array.ndim == len(tensor.axes) and min(array.shape, default=1) > 0
        for axis, size in zip(tensor.axes, array.shape, strict=False):
            known = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            is_right = is_right and size == known
        if not is_right:
            raise InputError(f"input {name!r} has shape {array.shape}; {shape} of at least one each is needed.")


class InPieces:
    """A graph that runs large batches one piece after another, so that a batch needs no more memory than a long row.

    Args:
        whole: what runs the pieces.
        inputs: of the graph.
    """

    def __init__(self, whole: Predictor, inputs: Mapping[str, Tensors]) -> None:
        self._whole, self._inputs = whole, inputs
        self.runtime, self.version, self.precision = whole.runtime, whole.version, whole.precision

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name."""
        check_inputs(self._inputs, inputs)
        rows = len(next(iter(inputs.values())))
        size = rows_at_once(self._length(inputs))
        if rows <= size:
            return self._whole.run(inputs)
        pieces = [
            self._whole.run({name: array[start : start + size] for name, array in inputs.items()})
            for start in range(0, rows, size)
        ]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _length(self, inputs: Arrays) -> int:
        """Of the longest axis that is free, besides the batch; 1 where all others are fixed, as images' are."""
        free = ((inputs[name].shape[place], axis) for name, own in self._inputs.items()
                for place, axis in enumerate(own.axes) if place)  # fmt: skip
        return max((size for size, axis in free if isinstance(axis, str)), default=1)

    def kernels(self) -> Mapping[str, str]:
        """What is executed, by the operator's name."""
        return self._whole.kernels()


def load_predictor(
    artifact: Artifact,
    runtime: Runtime = "onnxruntime",
    *,
    threads: int | None = None,
    precision: Precision = "float32",
) -> Predictor:
    """The graph of an artifact in a runtime.

    Args:
        artifact: of `read_artifact`.
        runtime: asked for by name; there is no fallback.
        threads: that a call may use; None for one a core.
        precision: of what is not quantized; `bfloat16` in OpenVINO alone.

    Raises:
        MissingExtraError: the runtime is not installed.
        ConfigError: an option is out of range or not of this runtime.
        ArtifactError: the runtime cannot read the graph.
    """
    check_options(threads, precision)
    if runtime not in _RUNTIMES:
        raise ConfigError(f"runtime={runtime!r} is unknown; known are {', '.join(_RUNTIMES)}.")
    if artifact.manifest.is_native and runtime != "onnxruntime":
        raise ArtifactError(
            f"{artifact.path} has attention as an operator of trilevel's kernels, which {runtime} has not. Use "
            "runtime='onnxruntime', or export the model with target='portable'."
        )
    return InPieces(_RUNTIMES[runtime](artifact, threads, precision), artifact.manifest.inputs)


def _onnxruntime(artifact: Artifact, threads: int | None, precision: Precision) -> Predictor:
    from trilevel.artifact.runtime.onnxruntime import OnnxRuntime

    if precision != "float32":
        raise ConfigError(
            f"runtime='onnxruntime' runs in float32; precision={precision!r} is OpenVINO's (runtime='openvino')."
        )
    return OnnxRuntime(artifact, threads=threads)


def _openvino(artifact: Artifact, threads: int | None, precision: Precision) -> Predictor:
    from trilevel.artifact.runtime.openvino import OpenVino

    return OpenVino(artifact, threads=threads, precision=precision)


def _torch(artifact: Artifact, threads: int | None, precision: Precision) -> Predictor:
    from trilevel.artifact.runtime.torch import Torch

    if precision != "float32":
        raise ConfigError(
            f"runtime='torch' runs in float32; precision={precision!r} is OpenVINO's (runtime='openvino')."
        )
    return Torch(artifact, threads=threads)


_RUNTIMES: dict[str, Callable[[Artifact, int | None, Precision], Predictor]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "torch": _torch,
}
