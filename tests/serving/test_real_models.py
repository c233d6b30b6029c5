"""Real artifacts behind real runtimes: answers in batches are those alone, and those that were exported."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

import trilevel.applications.documents
from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.probe import read_probes
from trilevel.artifact.verify import tolerance
from trilevel.serving.catalog import Source
from trilevel.serving.engine import EngineConfig, LocalEngine
from trilevel.serving.pool import PoolConfig
from trilevel.serving.requests import Request

SHIPPED = Path(trilevel.applications.documents.__file__).parent / "artifact-int8"


@pytest.mark.slow
def test_the_shipped_summariser(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    artifact = read_artifact(SHIPPED)
    (probe, *_) = read_probes(artifact)
    count = len(probe.inputs["input_ids"])

    async def work() -> None:
        config = EngineConfig(runtime="onnxruntime", pool=PoolConfig(instances=2))
        async with LocalEngine([Source(name="documents", folder=SHIPPED)], config) as engine:
            together = await engine.infer(Request(id="1", model="documents", inputs=probe.inputs))
            rows = [
                Request(id="2", model="documents", inputs={n: x[row : row + 1] for n, x in probe.inputs.items()})
                for row in range(count)
            ]
            alone = [await engine.infer(row) for row in rows]
            found = await asyncio.gather(*(engine.infer(row) for row in rows * 5))
        right = together.outputs["scores"]
        limit = tolerance("int8", "float32") * np.abs(probe.outputs["scores"]).max()
        np.testing.assert_allclose(right, np.asarray(probe.outputs["scores"], np.float32), atol=limit)
        np.testing.assert_array_equal(np.concatenate([one.outputs["scores"] for one in alone]), right)
        np.testing.assert_array_equal(
            np.concatenate([one.outputs["scores"] for one in found]), np.concatenate([right] * 5)
        )

    asyncio.run(work())
