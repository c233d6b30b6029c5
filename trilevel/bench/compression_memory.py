"""For processes whose memory is measured: one encoder, loaded as a user would load it, and one call.

Nothing is imported before it is known what is loaded: an artifact runs without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trilevel.artifact.runtime.predictor import Runtime

DENSE_TORCH = "dense, torch float32"
DENSE_OPENVINO = "dense, OpenVINO INT8 by NNCF"
DENSE_OURS = "trilevel dense INT8, OpenVINO"
MATERIALISED = "dense, attention materialised"
OURS_OPENVINO, OURS_ONNXRUNTIME = "trilevel INT8, OpenVINO", "trilevel INT8, ONNX Runtime"
OURS_NATIVE = "trilevel INT8, ONNX Runtime, native attention"
NNCF_FILE = "dense-nncf.xml"
ARTIFACT, ARTIFACT_NATIVE = "converted-int8", "converted-int8-native"
OURS: dict[str, tuple[str, Runtime]] = {
    OURS_OPENVINO: (ARTIFACT, "openvino"),
    OURS_ONNXRUNTIME: (ARTIFACT, "onnxruntime"),
    OURS_NATIVE: (ARTIFACT_NATIVE, "onnxruntime"),
}
MEASURED = (DENSE_TORCH, MATERIALISED, DENSE_OPENVINO, *OURS)


def one_call(name: str, work: str, tokens: int, threads: int) -> Callable[[], object]:
    """What runs `name` on one document of `tokens` tokens.

    Args:
        name: one of `MEASURED`.
        work: folder with the graphs.
        tokens: of the document.
        threads: of the call.
    """
    import numpy as np

    ids = np.random.default_rng(0).integers(1_000, 30_000, (1, tokens))
    if name in OURS:
        from trilevel.artifact.manifest import read_artifact
        from trilevel.artifact.runtime.predictor import load_predictor

        folder, runtime = OURS[name]
        predictor = load_predictor(read_artifact(Path(work) / folder), runtime, threads=threads)
        return lambda: predictor.run({"input_ids": ids})
    if name == DENSE_OPENVINO:
        from trilevel.artifact.runtime.openvino import openvino_core

        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        model = openvino_core().compile_model(str(Path(work) / NNCF_FILE), "CPU", options)
        return lambda: model([ids])
    return _torch(ids, threads, is_materialised=name == MATERIALISED)


def _torch(ids: object, threads: int, *, is_materialised: bool) -> Callable[[], object]:
    import torch

    from trilevel.bench.encoders_contenders import MINILM, Models, bert, quiet
    from trilevel.conversion.source import load_source

    torch.set_num_threads(threads)
    given = torch.as_tensor(ids)
    if is_materialised:
        with quiet():
            encode = bert(Models(folder=None, tokens=given.shape[1]), torch.float32, attention="eager")
    else:
        encode = load_source(MINILM).encoder.eval()

    def run() -> object:
        with torch.inference_mode():
            return encode(given)

    return run
