"""A model that takes no time, as every server of the comparison has it: what is left is the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel import __version__
from trilevel.artifact.manifest import MODEL_FILE, PROBE_FILE, Artifact, Manifest, Tensors, write_artifact
from trilevel.artifact.probe import Probe, write_probes
from trilevel.errors import require

Floats = npt.NDArray[np.float32]
NAME = "linear"
INPUT, OUTPUT = "x", "y"
FEATURES, CLASSES = 16, 4


def weights() -> Floats:
    """(FEATURES, CLASSES), whole numbers, so that sums are exact whatever the order."""
    return ((np.arange(FEATURES * CLASSES).reshape(FEATURES, CLASSES) * 7) % 11 - 5).astype(np.float32)


def rows(count: int) -> Floats:
    """(count, FEATURES), all different, whole numbers."""
    numbers = np.arange(count)[:, None]
    # the first two columns number the row
    found = (numbers * 13 + np.arange(FEATURES) * 5) % 17
    found[:, 0], found[:, 1] = numbers[:, 0] % 256, numbers[:, 0] // 256
    return found.astype(np.float32)


def write_trivial(folder: Path) -> Artifact:
    """An artifact of the product with `weights()`.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx", extra="export")
    helper, dims = onnx.helper, ("batch",)
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", [INPUT, "w"], [OUTPUT])],
        NAME,
        [helper.make_tensor_value_info(INPUT, kind, (*dims, FEATURES))],
        [helper.make_tensor_value_info(OUTPUT, kind, (*dims, CLASSES))],
        [onnx.numpy_helper.from_array(weights(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = rows(5)
    manifest = Manifest(
        task="embedding",
        name=NAME,
        trilevel=__version__,
        precision="float32",
        target=None,
        inputs={INPUT: Tensors(dtype="float32", axes=("batch", FEATURES))},
        outputs={OUTPUT: Tensors(dtype="float32", axes=("batch", CLASSES))},
    )
    probe = Probe(inputs={INPUT: x}, outputs={OUTPUT: x @ weights()})
    files = {
        MODEL_FILE: lambda path: path.write_bytes(model.SerializeToString()),
        PROBE_FILE: lambda path: write_probes([probe], path),
    }
    return write_artifact(folder, manifest, files)


def open_inference_json(x: Floats) -> list[bytes]:
    """Requests of one row each, as the protocol's JSON."""
    return [_dumped({"inputs": [_tensor(row)]}) for row in x]


def open_inference_grpc(x: Floats, model: str = NAME) -> list[bytes]:
    """Requests of one row each, as the protocol's messages."""
    from trilevel.serving.protocol import open_inference_pb2 as messages

    found = []
    for row in x:
        message = messages.ModelInferRequest(model_name=model)
        message.inputs.add(name=INPUT, datatype="FP32", shape=(1, FEATURES))
        message.raw_input_contents.append(row.astype("<f4").tobytes())
        found.append(message.SerializeToString())
    return found


def is_right(sent: Sequence[int], replies: Sequence[bytes], x: Floats, protocol: str) -> bool:
    """Whether each of the replies has the answer to the row that was sent."""
    read = _read_grpc if protocol == "grpc" else _read_json
    exact = x @ weights()
    return len(replies) > 0 and all(
        np.array_equal(read(reply), exact[row]) for row, reply in zip(sent, replies, strict=True)
    )


def _tensor(row: Floats) -> dict[str, Any]:
    return {"name": INPUT, "datatype": "FP32", "shape": [1, FEATURES], "data": row.tolist()}


def _dumped(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _read_json(reply: bytes) -> Floats:
    try:
        values = json.loads(reply)["outputs"][0]["data"]
    except (ValueError, KeyError, IndexError, TypeError):
        return np.empty(0, np.float32)
    return np.asarray(values, np.float32).reshape(-1)


def _read_grpc(reply: bytes) -> Floats:
    from trilevel.serving.protocol import open_inference_pb2 as messages

    message = messages.ModelInferResponse.FromString(reply)
    if message.raw_output_contents:
        return np.frombuffer(message.raw_output_contents[0], "<f4")
    return np.array([value for output in message.outputs for value in output.contents.fp32_contents], np.float32)
