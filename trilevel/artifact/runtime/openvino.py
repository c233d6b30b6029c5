"""OpenVINO on a CPU: the first choice on x86."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt

from trilevel.artifact.manifest import Artifact
from trilevel.artifact.probe import Arrays
from trilevel.artifact.runtime.predictor import Precision, check_inputs
from trilevel.errors import ArtifactError, require


# a signal that arrives after two of them were closed in the order they were opened ends the process (OpenVINO 2026.4.1
# leaves the thread with a signal stack that it has freed), so there is one, and it is never closed
@cache
def openvino_core() -> Any:
    """The process's one `openvino.Core`."""
    return require("openvino", extra="openvino").Core()


def read_graph(path: Path) -> Any:
    """The `openvino.Model` of a file; weights of 8 bits that are stored in 4 (see `QuantizedLinear`) are taken apart.

    Left to OpenVINO they would become float, and the products with them.

    Raises:
        RuntimeError: OpenVINO cannot read the file.
    """
    openvino = require("openvino", extra="openvino")
    core = openvino_core()
    model = core.read_model(str(path))
    fixed: set[str] = set()
    packed = []
    for node in model.get_ordered_ops():
        sources = [source.get_source_output().get_node().get_name() for source in node.inputs()]
        is_stored = node.get_type_name() == "Constant"
        if not (is_stored or (sources and fixed.issuperset(sources))):
            continue
        fixed.add(node.get_name())
        if not is_stored and all(output.get_element_type() == openvino.Type.i8 for output in node.outputs()):
            packed.append(node.output(0))
    if packed:
        found = core.compile_model(openvino.Model(packed, []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
        for place, output in enumerate(packed):
            stored = openvino.opset13.constant(found[place]).output(0)
            for reader in output.get_target_inputs():
                reader.replace_source_output(stored)
    return model


_HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino:
    """An artifact's graph in OpenVINO.

    The precision is always set: left to itself OpenVINO computes in bfloat16 where the processor can, and says nothing.
    Compiled models are not kept on disk: one that OpenVINO 2026.4.1 reads from its cache differs by 1e-4 of the largest
    value from the one it compiled.

    Args:
        artifact: of `read_artifact`.
        threads: that a call may use; None for one a core.
        precision: of what is not quantized.
        path: of another file with the same graph, as `export_openvino` writes; None for the artifact's own.

    Raises:
        MissingExtraError: openvino is not installed.
        ArtifactError: it cannot read the graph.
    """

    runtime = "openvino"

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        precision: Precision = "float32",
        path: Path | None = None,
    ) -> None:
        openvino = require("openvino", extra="openvino")
        self.version: str = openvino.__version__.partition("-")[0]
        self.precision = precision
        self._inputs, self._outputs = artifact.manifest.inputs, list(artifact.manifest.outputs)
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        path = artifact.file(artifact.graph) if path is None else path
        try:
            self._model = openvino_core().compile_model(read_graph(path), "CPU", options)
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO {self.version} cannot read {path} ({error}).") from error
        self._request = self._model.create_infer_request()

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name."""
        check_inputs(self._inputs, inputs)
        try:
            found = self._request.infer(dict(inputs))
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO {self.version} cannot run the graph ({error}).") from error
        # what the request holds is overwritten by the next call
        return {name: found[name].copy() for name in self._outputs}

    def kernels(self) -> Mapping[str, str]:
        """Executed primitives by name, as `FullyConnected brgemm_avx512_I8`."""
        found = {}
        for node in self._model.get_runtime_model().get_ops():
            info = node.get_rt_info()
            kind, primitive = (str(info[key].value if hasattr(info[key], "value") else info[key]) for key in _KEYS)
            found[node.get_friendly_name()] = f"{kind} {primitive}"
        return found


_KEYS = ("layerType", "primitiveType")
