"""How much of what the processor can do in 8 bits the linear maps of a compiled encoder reach."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from trilevel.artifact.manifest import MODEL_FILE
from trilevel.artifact.runtime.openvino import openvino_core
from trilevel.bench.compression_encoders import Encoders
from trilevel.bench.harness import interleave

REPEATS = 10
SHOWN = 8


def share_of_peak(encoders: Encoders, batch: int, tokens: int) -> dict[str, Any]:
    """Time of oneDNN's own int8 products over that of the artifact's linear maps in OpenVINO, at the same shapes.

    `share` is below 1 where the artifact is slower; `profile` says where the whole call's time goes, by kind of
    operator, in milliseconds of a call.
    """
    config = encoders.models.dense.encoder.config
    dim, ffn = config.dim, encoders.models.dense.encoder.get_submodule("stack.blocks.0.ffn.up").out_features
    assert isinstance(ffn, int)
    shapes = {(dim, 3 * dim): 1, (dim, dim): 1, (dim, ffn): 1, (ffn, dim): 1}
    best_ms = config.num_layers * sum(times * _onednn_ms(batch * tokens, *shape) for shape, times in shapes.items())
    profile, linear_ms = _profile(encoders, batch, tokens)
    rows = batch * tokens
    operations = 2 * rows * config.num_layers * sum(a * b * times for (a, b), times in shapes.items())
    return {
        "batch": batch,
        "tokens": tokens,
        "share": best_ms / linear_ms,
        "onednn_ms": best_ms,
        "linear_ms": linear_ms,
        "onednn_tops": operations / best_ms / 1e9,
        "profile_ms": profile,
    }


def _onednn_ms(rows: int, inputs: int, outputs: int) -> float:
    """A product of unsigned 8-bit activations with signed 8-bit weights, packed beforehand, to float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 128, (rows, inputs), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-64, 64, (outputs, inputs), generator=generator, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, [rows, inputs])
    scales, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)

    def product() -> torch.Tensor:
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out

    with torch.inference_mode():
        return interleave({"": product}, budget_s=0.0, min_repeats=REPEATS, warm_up=2)[""].median_ms


def _profile(encoders: Encoders, batch: int, tokens: int) -> tuple[dict[str, float], float]:
    """Milliseconds by kind of operator, largest first, and those of the integer linear maps."""
    options = {
        "PERF_COUNT": True,
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    path = encoders.artifact("converted").file(MODEL_FILE)
    request = openvino_core().compile_model(str(path), "CPU", options).create_infer_request()
    ids = np.random.default_rng(0).integers(1_000, 30_000, (batch, tokens))
    spent: dict[str, list[float]] = defaultdict(list)
    linear = []
    for turn in range(REPEATS + 1):
        request.infer([ids])
        if turn == 0:
            continue
        kinds: dict[str, float] = defaultdict(float)
        own = 0.0
        for node in request.get_profiling_info():
            ms = node.real_time.total_seconds() * 1e3
            kinds[node.node_type] += ms
            own += ms * (node.node_type.startswith("FullyConnected") and node.exec_type.lower().endswith("_i8"))
        linear.append(own)
        for kind, ms in kinds.items():
            spent[kind].append(ms)
    medians = {kind: float(np.median(own)) for kind, own in spent.items()}
    shown = dict(sorted(medians.items(), key=lambda pair: -pair[1])[:SHOWN])
    return shown, float(np.median(linear))
