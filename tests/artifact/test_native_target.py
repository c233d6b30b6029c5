"""Attention as an operator of the native kernels inside ONNX Runtime: torch's answers, and clear words elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.artifact.models import AXES, LEVELS, Mean, call, int8_model
from trilevel.artifact.check import check_runtimes, default_runtime, installed
from trilevel.artifact.export.artifact import Graph, export_artifact
from trilevel.artifact.export.attention import NAME
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.manifest import MODEL_FILE, REPORT_FILE, Artifact, read_artifact
from trilevel.artifact.runtime.predictor import Runtime, load_predictor
from trilevel.attention import library
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ArtifactError, ConfigError, ImplementationError

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed")

pytestmark = [
    pytest.mark.skipif(not library.is_available(), reason="no native kernels are built"),
    pytest.mark.timeout(400),
]


def written(model: nn.Module, folder: Path) -> Artifact:
    calls = [call(2, 53), call(1, 61), call(2, 7)]
    graph = Graph(task="embedding", name="mean", module=model, calls=calls, axes=AXES, output="vector")
    return export_artifact(graph, folder, target="native", tell=lambda _: None)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return written(Mean(LEVELS).eval(), tmp_path_factory.mktemp("native") / "artifact")


def test_equals_torch_at_every_size(artifact: Artifact) -> None:
    model = Mean(LEVELS).eval()
    predictor = load_predictor(artifact, "onnxruntime", threads=1)
    kinds = list(predictor.kernels().values())
    assert kinds.count(NAME) == 2
    assert "TopK" not in kinds
    for given in (call(1, 1), call(3, 5), call(2, 8), call(3, 53), call(1, 130), call(2, 511)):
        found = predictor.run({name: array.numpy() for name, array in given.items()})["vector"]
        np.testing.assert_allclose(found, model(**given).detach().numpy(), atol=1e-5)


def test_integer_weights(tmp_path: Path) -> None:
    made = written(int8_model(), tmp_path / "int8")
    assert (made.manifest.precision, made.manifest.target) == ("int8", "native")
    (row,) = json.loads(made.file(REPORT_FILE).read_text())["parity"]
    assert row["holds"]
    assert row["integer_kernels"] > 0


class Layer(nn.Module):
    """One layer that is told everything that a layer can be told."""

    def __init__(self, levels: Levels | None, **sizes: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = MultiLevelAttention(48, 6, levels=levels, **sizes)
        if levels is not None and self.layer.pool_weight is not None:
            nn.init.normal_(self.layer.pool_weight)

    def forward(self, x: Tensor, padding: Tensor, segments: Tensor, prior: Tensor, forced: Tensor) -> Tensor:
        levels = {} if self.layer.levels is None else {"global_prior": prior, "global_forced": forced}
        found: Tensor = self.layer(x, padding_mask=padding, segment_ids=segments, num_segments=3, **levels)
        return found


def told(batch: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[-1, tokens - tokens // 5 :] = True
    places = torch.arange(tokens)
    return {
        "x": torch.randn(batch, tokens, 48, generator=generator),
        "padding": padding,
        "segments": (3 * places // tokens).expand(batch, -1).contiguous(),
        "prior": torch.randn(batch, tokens, generator=generator),
        "forced": (places % 31 == 7).expand(batch, -1).contiguous(),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("levels", "sizes"),
    [
        (LEVELS, {"num_kv_heads": 3}),
        (replace(LEVELS, ratio=LevelRatio(1, 0, 0)), {}),
        (replace(LEVELS, ratio=LevelRatio(0, 0, 1), num_sinks=2), {}),
        (LEVELS, {"num_dense_heads": 2}),
        (None, {}),
    ],
)
def test_everything_that_a_layer_is_told(tmp_path: Path, levels: Levels | None, sizes: dict[str, int]) -> None:
    model = Layer(levels, **sizes).eval()
    axes: dict[str, tuple[int | str, ...]] = dict.fromkeys(told(1, 3), ("batch", "tokens"))
    axes |= {"x": ("batch", "tokens", 48), "y": ("batch", "tokens", 48)}
    inputs, outputs = export_onnx(model, told(2, 53), axes, tmp_path / MODEL_FILE, output="y", is_native=True)
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library.library_path()))
    session = onnxruntime.InferenceSession(str(tmp_path / MODEL_FILE), options)
    assert (set(inputs), set(outputs)) == ({*told(1, 3)}, {"y"})
    taken = {one.name for one in session.get_inputs()}
    for batch, tokens in ((1, 5), (2, 53), (3, 131)):
        given = told(batch, tokens)
        (found,) = session.run(None, {name: array.numpy() for name, array in given.items() if name in taken})
        np.testing.assert_allclose(found, model(**given).detach().numpy(), atol=2e-5)


def test_threads_are_those_of_the_session(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(library.library(), "trilevel_set_threads", asked.append)
    given = {name: array.numpy() for name, array in call(1, 9).items()}
    load_predictor(artifact, "onnxruntime", threads=3).run(given)
    load_predictor(artifact, "onnxruntime").run(given)
    assert asked == [3, 0]


def test_runs_without_torch(artifact: Artifact) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.runtime.predictor import load_predictor
predictor = load_predictor(read_artifact({str(artifact.path)!r}), "onnxruntime", threads=1)
ones = np.ones((1, 3), np.int64)
print(predictor.run({{"input_ids": ones, "attention_mask": ones}})["vector"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 24)", done.stderr


def test_other_runtimes_say_what_to_do(artifact: Artifact) -> None:
    assert default_runtime(artifact) == "onnxruntime"
    assert installed(artifact) == ["onnxruntime"]
    others: list[Runtime] = [name for name in installed() if name != "onnxruntime"]
    assert others
    for runtime in others:
        with pytest.raises(ArtifactError, match=rf"which {runtime} has not. Use runtime='onnxruntime', or export"):
            load_predictor(artifact, runtime)
    assert [bool(row.error) for row in check_runtimes(artifact, [others[0], "onnxruntime"])] == [True, False]


def test_without_kernels(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImplementationError("impl='native' has no library (it was never built).")

    monkeypatch.setattr(library, "library", missing)
    with pytest.raises(ArtifactError, match=r"it was never built\). Or export the model with target='portable'"):
        load_predictor(artifact, "onnxruntime")


def test_shapes_that_do_not_belong_together_are_an_error(tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    sizes = {
        "local": 2,
        "regional": 0,
        "global": 0,
        "radius": 1,
        "region_size": 4,
        "num_global_tokens": 0,
        "num_sinks": 0,
    }
    node = helper.make_node(NAME, ["q", "k", "v", "", "s"], ["y"], domain="trilevel", scale=1.0, **sizes)
    values = {name: helper.make_tensor_value_info(name, kind, [None] * 4) for name in "qkvy"}
    values["s"] = helper.make_tensor_value_info("s", kind, [None] * 2)
    graph = helper.make_graph([node], "one", [values[name] for name in "qkvs"], [values["y"]])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trilevel", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(tmp_path / "one.onnx"))
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library.library_path()))
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), options)
    x, score = np.ones((1, 5, 2, 4), np.float32), np.zeros((1, 5), np.float32)
    np.testing.assert_allclose(session.run(None, {"q": x, "k": x, "v": x, "s": score})[0], x, rtol=1e-6)
    # three heads are not two, and keys of other tokens
    for query, key in ((x.repeat(2, axis=2)[:, :, :3], x), (x, x[:, :4])):
        with pytest.raises(Exception, match="query, key and value are no"):
            session.run(None, {"q": query, "k": key, "v": key, "s": score})
    with pytest.raises(Exception, match=r"input 4 is no \(1, 5\)"):
        session.run(None, {"q": x, "k": x, "v": x, "s": score[:, :4]})


def test_a_target_that_is_unknown(tmp_path: Path, artifact: Artifact) -> None:
    assert read_artifact(artifact.path).manifest.target == "native"
    model = Mean(LEVELS, num_layers=1).eval()
    graph = Graph(task="embedding", name="mean", module=model, calls=[call(2, 7)], axes=AXES, output="vector")
    with pytest.raises(ConfigError, match="target='npu' is unknown; known are portable, cpu, native"):
        export_artifact(graph, tmp_path / "no", target="npu", tell=lambda _: None)
