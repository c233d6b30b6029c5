"""Whether a runtime gives the answers that the artifact was made to give."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import MODEL_FILE, Artifact, Tensors
from trilevel.artifact.probe import Arrays, Probe, read_probes
from trilevel.artifact.runtime.predictor import Precision, Predictor
from trilevel.errors import ArtifactError, require
from trilevel.model.folder import sha256_of

TOLERANCES = {("float32", "float32"): 1e-4, ("float32", "bfloat16"): 5e-2}
"""Largest difference over the largest value of an output, by precision of the weights and of the rest."""

INTEGER_TOLERANCE = 1e-2
"""Of integer weights: another runtime may round a value to the step beside it."""

INTEGER_BFLOAT16_TOLERANCE = 6e-2


def tolerance(weights: str, precision: Precision) -> float:
    """What two runtimes may differ by, over the largest value, by precision of the weights and of the rest."""
    if weights == "float32":
        return TOLERANCES["float32", precision]
    return INTEGER_TOLERANCE if precision == "float32" else INTEGER_BFLOAT16_TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How one runtime's outputs differ from those expected.

    Attributes:
        runtime, precision: which.
        calls: compared.
        difference: largest, over the largest expected value of its call.
        cosine: lowest of a row's output to the expected one.
        agreement: share of rows whose largest output is in the same place.
        tolerance: what `difference` may be.
    """

    runtime: str
    precision: str
    calls: int
    difference: float
    cosine: float
    agreement: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; a value that is no number is not."""
        return self.difference <= self.tolerance


def parity(artifact: Artifact, predictor: Predictor, expected: Iterable[Probe]) -> Parity:
    """Run every probe and compare.

    Raises:
        InputError: a probe does not fit the graph.
    """
    pairs = []
    for probe in expected:
        found = predictor.run(probe.inputs)
        pairs += [(found[name], wanted) for name, wanted in probe.outputs.items()]
    limit = tolerance(artifact.manifest.precision, predictor.precision)
    return compared(pairs, runtime=predictor.runtime, precision=predictor.precision, limit=limit)


def compared(
    pairs: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]], *, runtime: str, precision: str, limit: float
) -> Parity:
    """Parity of outputs, each with the one expected, first axis rows."""
    differences, cosines, agreements = [], [], []
    for found, wanted in pairs:
        given, right = (np.asarray(x, np.float64).reshape(len(wanted), -1) for x in (found, wanted))
        differences.append(np.abs(given - right).max() / max(np.abs(right).max(), 1e-12))
        cosines.append(_cosine(given, right).min())
        agreements.append((given.argmax(1) == right.argmax(1)).mean())
    return Parity(
        runtime=runtime,
        precision=precision,
        calls=len(differences),
        difference=float(np.max(differences)),
        cosine=float(np.min(cosines)),
        agreement=float(np.mean(agreements)),
        tolerance=limit,
    )


def check_probes(artifact: Artifact, predictor: Predictor) -> Parity:
    """Compare the artifact's own probes, as every load does.

    Raises:
        ArtifactError: the runtime gives other answers.
    """
    found = parity(artifact, predictor, read_probes(artifact))
    if not found.holds:
        raise ArtifactError(
            f"{artifact.path} gives other answers in {predictor.runtime} {predictor.version} "
            f"({predictor.precision}) than it was made to give: they differ by {found.difference:.2g} of the largest "
            f"value, {found.tolerance:g} is allowed. Export it with this version of the runtime, or use another."
        )
    return found


def chosen_tokens(artifact: Artifact, open_graph: Any, calls: Sequence[Arrays]) -> list[list[npt.NDArray[Any]]]:
    """The global tokens that each layer chose, (batch, p) positions, for every call; empty without global heads.

    Args:
        artifact: whose graph is read.
        open_graph: what makes a `Predictor` of an artifact.
        calls: inputs.
    """
    onnx = require("onnx", extra="export")
    model = onnx.load(str(artifact.file(MODEL_FILE)))
    read = {name for node in model.graph.node for name in node.input}
    # another TopK of each layer finds the least score; its places are not read
    picks = [node.output[1] for node in model.graph.node if node.op_type == "TopK" and node.output[1] in read]
    if not picks:
        return [[] for _ in calls]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["batch", None]) for name in picks
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_FILE
        onnx.save(model, str(path))
        opened = replace(
            artifact,
            path=Path(folder),
            hashes={MODEL_FILE: sha256_of(path)},
            manifest=replace(artifact.manifest, outputs=dict.fromkeys(picks, _POSITIONS)),
        )
        predictor: Predictor = open_graph(opened)
        return [[found[name] for name in picks] for found in map(predictor.run, calls)]


_POSITIONS = Tensors(dtype="int64", axes=("batch", "chosen"))


def overlap(found: Sequence[Sequence[npt.NDArray[Any]]], wanted: Sequence[Sequence[npt.NDArray[Any]]]) -> float:
    """Share of the chosen tokens that both chose, over all calls, layers and rows; 1.0 where nothing is chosen.

    >>> overlap([[np.array([[3, 5]])]], [[np.array([[5, 8]])]])
    0.5
    """
    shares = [
        len(set(mine.tolist()) & set(theirs.tolist())) / len(theirs)
        for call, other in zip(found, wanted, strict=True)
        for layer, reference in zip(call, other, strict=True)
        for mine, theirs in zip(layer, reference, strict=True)
    ]
    return float(np.mean(shares)) if shares else 1.0


def integer_kernels(predictor: Predictor) -> Mapping[str, str]:
    """The executed operators that compute weight products in integers, by name: what proves that INT8 runs.

    OpenVINO names the type of a primitive (`..._I8`); ONNX Runtime rewrites products to operators of its own.
    """
    return {name: kind for name, kind in predictor.kernels().items() if _is_integer(kind)}


def _is_integer(kind: str) -> bool:
    is_product = kind.startswith(("FullyConnected", "MatMul", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulNBits"))
    is_openvino = " " in kind
    return is_product and (not is_openvino or kind.lower().endswith(("_i8", "_u8"))) and kind != "MatMul"


def _cosine(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine: npt.NDArray[np.float64] = (x * y).sum(1) / np.maximum(lengths, 1e-12)
    return cosine
