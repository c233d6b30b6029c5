"""What is traced: the graph takes every size, whichever the first call has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.artifact.models import AXES, LEVELS, Mean, call
from trilevel.artifact.export.artifact import Graph, export_artifact
from trilevel.artifact.runtime.predictor import load_predictor


@pytest.mark.slow
def test_a_first_call_of_one_region_ties_the_graph_to_nothing(tmp_path: Path) -> None:
    model = Mean(LEVELS, num_layers=1).eval()
    calls = [call(2, 7), call(2, 43), call(1, 61)]
    graph = Graph(task="embedding", name="mean", module=model, calls=calls, axes=AXES, output="vector")
    artifact = export_artifact(graph, tmp_path / "artifact", target="portable", tell=lambda _: None)
    predictor = load_predictor(artifact, "onnxruntime", threads=1)
    for given in (call(3, 1), call(1, 83), call(2, 131)):
        found = predictor.run({name: array.numpy() for name, array in given.items()})["vector"]
        np.testing.assert_allclose(found, model(**given).detach().numpy(), atol=1e-5)
