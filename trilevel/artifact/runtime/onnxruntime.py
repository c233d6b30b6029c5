"""ONNX Runtime on a CPU: x86 and ARM, the smallest memory."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from trilevel.artifact.manifest import Artifact
from trilevel.artifact.probe import Arrays
from trilevel.artifact.runtime.predictor import Precision, check_inputs
from trilevel.errors import ArtifactError, ImplementationError, require

SESSION_ENTRIES = {
    # a process that waits busily takes the cores of the others
    "session.intra_op.allow_spinning": "0",
    # 4-bit weights are multiplied with float activations; else they would be rounded to 8 bits unasked
    "session.qdq_matmulnbits_accuracy_level": "1",
}


class OnnxRuntime:
    """An artifact's graph in ONNX Runtime.

    Args:
        artifact: of `read_artifact`.
        threads: that a call may use; None for one a core.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ArtifactError: it cannot read the graph.
    """

    runtime = "onnxruntime"
    precision: Precision = "float32"

    def __init__(self, artifact: Artifact, *, threads: int | None = None) -> None:
        self._ort = require("onnxruntime", extra="onnxruntime")
        self.version: str = self._ort.__version__
        self._inputs, self._path = artifact.manifest.inputs, artifact.file(artifact.graph)
        self._threads = threads
        self._kernels = _kernels(artifact)
        self._outputs = list(artifact.manifest.outputs)
        self._session = self._open()

    def _open(self, **options: Any) -> Any:
        settings = self._ort.SessionOptions()
        # errors are raised; warnings are about graphs, which the user did not write
        settings.log_severity_level = 3
        # plans memory for each shape that it has seen: for free lengths that takes more of it and saves no time
        settings.enable_mem_pattern = False
        for entry, value in SESSION_ENTRIES.items():
            settings.add_session_config_entry(entry, value)
        if self._threads is not None:
            settings.intra_op_num_threads = self._threads
        for name, choice in options.items():
            setattr(settings, name, choice)
        try:
            if self._kernels is not None:
                settings.register_custom_ops_library(self._kernels[1])
            return self._ort.InferenceSession(str(self._path), settings, providers=["CPUExecutionProvider"])
        # its errors have classes of their own, derived from Exception alone
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime {self.version} cannot read {self._path} ({error}).") from error

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name."""
        check_inputs(self._inputs, inputs)
        if self._kernels is not None:
            # operators run in this thread, and know nothing of the session
            self._kernels[0].trilevel_set_threads(self._threads or 0)
        try:
            found = self._session.run(self._outputs, dict(inputs))
        # as above
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime {self.version} cannot run {self._path} ({error}).") from error
        return dict(zip(self._outputs, found, strict=True))

    def kernels(self) -> Mapping[str, str]:
        """Operators of the graph as ONNX Runtime rewrote it, by name; integer ones have names of their own."""
        onnx = require("onnx", extra="export")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            self._open(optimized_model_filepath=str(path))
            nodes = onnx.load(str(path)).graph.node
        return {node.name or f"{node.op_type}_{index}": node.op_type for index, node in enumerate(nodes)}


def _kernels(artifact: Artifact) -> tuple[ctypes.CDLL, str] | None:
    """The library of native kernels and its file, where the graph has operators of it."""
    if not artifact.manifest.is_native:
        return None
    from trilevel.attention import library

    try:
        return library.library(), str(library.library_path())
    except ImplementationError as error:
        raise ArtifactError(
            f"{artifact.path} has attention as an operator of trilevel's kernels: {error} Or export the model with "
            "target='portable'."
        ) from error
