"""An artifact's graph in OpenVINO's own files, for devices that get OpenVINO without its ONNX reader.

`OpenVino(artifact, path=export_openvino(artifact, folder))` runs them: its `kernels()` are the executed primitives with
their types, of which `verify.integer_kernels` lists those that prove that INT8 runs.
"""

from __future__ import annotations

from pathlib import Path

from trilevel.artifact.manifest import MODEL_FILE, Artifact
from trilevel.artifact.runtime.openvino import OpenVino, read_graph
from trilevel.artifact.verify import check_probes
from trilevel.errors import ArtifactError, require

IR_FILE = "model.xml"


def export_openvino(artifact: Artifact, folder: Path) -> Path:
    """Write `model.xml` (operators) and `model.bin` (weights) to `folder`, and run the artifact's probes on them.

    Stored integers stay integers, and floats keep their 32 bits: OpenVINO would halve them unasked, and the answers
    would no longer be those of the ONNX file. The files carry no hashes and no manifest; keep the artifact.

    Args:
        artifact: of `read_artifact`.
        folder: made if needed; files of these names are replaced.

    Returns:
        The path of `model.xml`, which names the other by being beside it.

    Raises:
        MissingExtraError: openvino is not installed.
        ArtifactError: OpenVINO cannot read the graph or the files cannot be written; or they give other answers.
    """
    openvino = require("openvino", extra="openvino")
    source, path = artifact.file(MODEL_FILE), folder / IR_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        openvino.save_model(read_graph(source), str(path), compress_to_fp16=False)
    # what OpenVINO raises when a disk is full is a RuntimeError too
    except (RuntimeError, OSError) as error:
        raise ArtifactError(f"{source} cannot be written to {folder} by OpenVINO ({error}).") from error
    check_probes(artifact, OpenVino(artifact, threads=1, path=path))
    return path
