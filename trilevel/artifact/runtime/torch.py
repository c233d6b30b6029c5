"""Torch, operator by operator: reads the artifact's own graph, so that no second copy of the weights is needed.

For a look at what other runtimes do, and where none of them is installed; nothing is fused, so it is slower than both.
Everything is computed in float: stored integers are made float where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from trilevel.artifact.manifest import Artifact
from trilevel.artifact.probe import Arrays
from trilevel.artifact.runtime.predictor import Precision, check_inputs
from trilevel.errors import ArtifactError, require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class Torch:
    """An artifact's graph in torch.

    Args:
        artifact: of `read_artifact`.
        threads: that a call may use; None for torch's own number.

    Raises:
        MissingExtraError: torch or onnx is not installed.
        ArtifactError: the graph cannot be read, or has an operator that is not known here.
    """

    runtime = "torch"
    precision: Precision = "float32"

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        self._torch, onnx = require("torch", extra="export"), require("onnx", extra="export")
        from trilevel.artifact.runtime.torch_operators import OPERATORS

        self.version: str = self._torch.__version__
        self._manifest, self._threads = artifact.manifest, threads
        path = artifact.file(artifact.graph)
        try:
            graph = onnx.load(str(path)).graph
            self._weights = {one.name: self._tensor(onnx.numpy_helper.to_array(one)) for one in graph.initializer}
            self._steps = [_Step(onnx, node) for node in graph.node]
        # protobuf and onnx raise errors of many classes for what is no graph
        except Exception as error:
            raise ArtifactError(f"torch {self.version} cannot read {path} ({error}).") from error
        unknown = sorted({step.kind for step in self._steps} - set(OPERATORS))
        if unknown or not self._steps:
            raise ArtifactError(
                f"torch {self.version} cannot read {path}: it has {', '.join(unknown) or 'no operators'}, not known "
                "here. Use another runtime."
            )
        self._operators = OPERATORS
        _free_early(self._steps, keep={*self._weights, *self._manifest.outputs})

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        # a copy: arrays that lie in the file's bytes cannot be written, which torch warns of
        tensor: Tensor = self._torch.from_numpy(array.copy())
        return tensor

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name."""
        check_inputs(self._manifest.inputs, inputs)
        values: dict[str, Tensor] = self._weights | {name: self._tensor(array) for name, array in inputs.items()}
        with self._torch.inference_mode(), self._limited():
            for step in self._steps:
                made = self._made(step, values)
                values.update(zip(step.outputs, made if isinstance(made, Sequence) else [made], strict=False))
                for name in step.done:
                    del values[name]
        return {name: values[name].numpy() for name in self._manifest.outputs}

    def _made(self, step: _Step, values: Mapping[str, Tensor]) -> Tensor | Sequence[Tensor]:
        given = [values[name] if name else None for name in step.inputs]
        try:
            made: Tensor | Sequence[Tensor] = self._operators[step.kind](*given, **step.options)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ArtifactError(f"torch {self.version} cannot run {step.kind} {step.name} ({error}).") from error
        return made

    def kernels(self) -> Mapping[str, str]:
        """Operators of the graph, by name; all of them compute in float."""
        return {step.name: f"torch {step.kind}" for step in self._steps}

    @contextmanager
    def _limited(self) -> Iterator[None]:
        before = self._torch.get_num_threads()
        if self._threads is not None:
            self._torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            self._torch.set_num_threads(before)


class _Step:
    """A node: what it is, what it reads and makes, and which values nobody needs behind it."""

    def __init__(self, onnx: Any, node: Any) -> None:
        self.kind: str = node.op_type
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.name: str = node.name or self.outputs[0]
        self.options = {one.name: _plain(onnx.helper.get_attribute_value(one)) for one in node.attribute}
        self.done: list[str] = []


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _free_early(steps: Sequence[_Step], *, keep: set[str]) -> None:
    seen = {name for name in keep if name} | {""}
    for step in reversed(steps):
        step.done = sorted({*step.inputs, *step.outputs} - seen)
        seen |= {*step.inputs, *step.outputs}
