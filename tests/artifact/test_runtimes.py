"""One file, the same answers in every runtime, for every batch and length; wrong inputs are named."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.artifact.models import call, mean_model, probe
from trilevel.artifact.export.onnx import export_onnx, exportable
from trilevel.artifact.manifest import MODEL_FILE, Artifact
from trilevel.artifact.probe import Arrays
from trilevel.artifact.runtime.predictor import InPieces, Predictor, Runtime, load_predictor
from trilevel.artifact.verify import check_probes, chosen_tokens, integer_kernels, overlap, parity
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import Levels
from trilevel.errors import ArtifactError, ConfigError, InputError, MissingExtraError

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
SIZES = [(1, 1), (1, 2), (3, 33), (1, 64), (2, 127), (1, 512), (5, 8)]


def load(artifact: Artifact, runtime: Runtime, **options: Any) -> Predictor:
    return load_predictor(artifact, runtime, threads=1, **options)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_equals_torch_at_every_size(mean_artifact: Artifact, runtime: Runtime) -> None:
    found = parity(mean_artifact, load(mean_artifact, runtime), [probe(*size) for size in SIZES])
    assert found.holds
    assert found.difference < 1e-5
    assert found.agreement == 1.0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_dense_attention_too(dense_artifact: Artifact, runtime: Runtime) -> None:
    found = parity(dense_artifact, load(dense_artifact, runtime), [probe(*size, is_dense=True) for size in SIZES])
    assert found.difference < 1e-5


def test_bfloat16_is_asked_for_and_differs(mean_artifact: Artifact) -> None:
    exact, rounded = (load(mean_artifact, "openvino", precision=p) for p in ("float32", "bfloat16"))
    one = probe(2, 61)
    found = parity(mean_artifact, rounded, [one])
    assert found.precision == "bfloat16"
    assert found.difference < 5e-2
    # left to itself OpenVINO would round in both
    assert np.abs(exact.run(one.inputs)["vector"] - one.outputs["vector"]).max() < 1e-5


def test_the_same_tokens_are_chosen(mean_artifact: Artifact) -> None:
    one = probe(2, 127)
    ours, theirs = (
        chosen_tokens(mean_artifact, lambda own, runtime=runtime: load(own, runtime), [one.inputs])
        for runtime in RUNTIMES
    )
    assert len(ours[0]) == 2
    assert overlap(ours, theirs) == 1.0
    assert overlap(ours, [[layer + 1 for layer in ours[0]]]) < 1.0
    inputs = {name: torch.from_numpy(x) for name, x in one.inputs.items()}
    with torch.no_grad():
        details: Any = mean_model().encoder(
            inputs["input_ids"], padding_mask=inputs["attention_mask"] == 0, explain=True
        )
    wanted = [[explanation.global_index.numpy() for explanation in details.explanations]]
    assert overlap(ours, wanted) == 1.0


class Seen:
    """Passes calls on and keeps how many rows each had."""

    def __init__(self, whole: Predictor) -> None:
        self.whole, self.rows = whole, list[int]()
        self.runtime, self.version, self.precision = whole.runtime, whole.version, whole.precision
        self.kernels = whole.kernels

    def run(self, inputs: Arrays) -> dict[str, Any]:
        self.rows.append(len(inputs["input_ids"]))
        return self.whole.run(inputs)


def test_a_large_batch_runs_in_pieces(mean_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    one = probe(5, 33)
    seen = Seen(load(mean_artifact, "onnxruntime"))
    pieces = InPieces(seen, mean_artifact.manifest.inputs)
    whole = pieces.run(one.inputs)["vector"]
    monkeypatch.setattr("trilevel.routing.steps.MAX_PLACES", 70)
    np.testing.assert_allclose(pieces.run(one.inputs)["vector"], whole, atol=1e-6)
    # a row that is longer than all that may run at once runs alone
    monkeypatch.setattr("trilevel.routing.steps.MAX_PLACES", 10)
    np.testing.assert_allclose(pieces.run(one.inputs)["vector"], whole, atol=1e-6)
    assert seen.rows == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    assert isinstance(load(mean_artifact, "onnxruntime"), InPieces)
    with pytest.raises(InputError, match="takes"):
        pieces.run({"input_ids": one.inputs["input_ids"]})


def test_inputs_are_unchanged_and_outputs_one_s_own(mean_artifact: Artifact) -> None:
    for runtime in RUNTIMES:
        predictor, first, second = load(mean_artifact, runtime), probe(1, 64), probe(1, 64)
        found = predictor.run(first.inputs)["vector"]
        before = found.copy()
        predictor.run(probe(1, 33).inputs)
        np.testing.assert_array_equal(found, before)
        np.testing.assert_array_equal(first.inputs["input_ids"], second.inputs["input_ids"])


def test_float_weights_have_no_integer_kernels(mean_artifact: Artifact) -> None:
    for runtime in RUNTIMES:
        predictor = load(mean_artifact, runtime)
        assert len(predictor.kernels()) > 20
        assert not integer_kernels(predictor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"input_ids": x["input_ids"]}, "inputs \\['input_ids'\\].*takes"),
        (lambda x: x | {"more": x["input_ids"]}, "'more'"),
        (lambda x: x | {"input_ids": x["input_ids"].astype(np.int32)}, "is int32; int64 \\(batch, tokens\\)"),
        (lambda x: x | {"input_ids": [[1, 2]]}, "is list; int64"),
        (lambda x: x | {"input_ids": x["input_ids"][0]}, "has shape \\(13,\\)"),
        (lambda x: x | {"attention_mask": x["attention_mask"][:, :5]}, "'attention_mask' has shape \\(1, 5\\)"),
        (lambda x: {name: own[:, :0] for name, own in x.items()}, "has shape \\(1, 0\\).*at least one"),
    ],
)
def test_wrong_inputs_are_named(mean_artifact: Artifact, change: Any, message: str) -> None:
    inputs = {name: x.numpy() for name, x in call(1, 13).items()}
    for runtime in RUNTIMES:
        with pytest.raises(InputError, match=message):
            load(mean_artifact, runtime).run(change(inputs))


def test_options_that_no_runtime_has(mean_artifact: Artifact) -> None:
    with pytest.raises(ConfigError, match="runtime='tpu' is unknown; known are onnxruntime, openvino"):
        load_predictor(mean_artifact, "tpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="threads=0 must be >= 1"):
        load_predictor(mean_artifact, threads=0)
    with pytest.raises(ConfigError, match="precision='float16' is unknown"):
        load_predictor(mean_artifact, precision="float16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"onnxruntime.*runs in float32.*openvino"):
        load_predictor(mean_artifact, precision="bfloat16")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_missing(mean_artifact: Artifact, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'trilevel\[{runtime}\]'"):
        load(mean_artifact, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_graph_that_is_none(mean_artifact: Artifact, runtime: Runtime, tmp_path: Any) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"no graph")
    from trilevel.model.folder import sha256_of

    damaged = replace(mean_artifact, path=tmp_path, hashes={MODEL_FILE: sha256_of(tmp_path / MODEL_FILE)})
    with pytest.raises(ArtifactError, match="cannot read"):
        load(damaged, runtime)


def test_other_answers_are_refused(mean_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load(mean_artifact, "onnxruntime")
    assert check_probes(mean_artifact, predictor).holds
    run = predictor.run
    monkeypatch.setattr(predictor, "run", lambda inputs: {"vector": run(inputs)["vector"] * 1.01})
    with pytest.raises(ArtifactError, match="gives other answers in onnxruntime"):
        check_probes(mean_artifact, predictor)
    monkeypatch.setattr(predictor, "run", lambda inputs: {"vector": run(inputs)["vector"] * np.nan})
    with pytest.raises(ArtifactError, match="gives other answers"):
        check_probes(mean_artifact, predictor)


def test_running_needs_no_torch(mean_artifact: Artifact) -> None:
    code = f"""
import sys
from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.runtime.predictor import load_predictor
from trilevel.artifact.verify import check_probes
artifact = read_artifact({str(mean_artifact.path)!r})
check_probes(artifact, load_predictor(artifact, threads=1))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("first", [0, 1])
def test_signals_are_heard_after_a_runtime_was_closed(mean_artifact: Artifact, first: int) -> None:
    code = f"""
import gc, os, signal
from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.runtime.predictor import load_predictor
artifact = read_artifact({str(mean_artifact.path)!r})
opened = [load_predictor(artifact, "openvino", threads=1) for _ in range(2)]
heard = []
signal.signal(signal.SIGINT, lambda *given: heard.append(given))
for turn in ({first}, 0):
    del opened[turn]
    gc.collect()
    os.kill(os.getpid(), signal.SIGINT)
assert len(heard) == 2
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_cannot_be_exported_is_named() -> None:
    layers = torch.nn.ModuleDict({"first": MultiLevelAttention(24, 3, levels=Levels(mode="strict"))})
    with pytest.raises(ConfigError, match="first has mode='strict'"):
        exportable(layers)
    layers = torch.nn.ModuleDict({"first": MultiLevelAttention(24, 3, levels=Levels(), is_causal=True)})
    with pytest.raises(ConfigError, match="first has is_causal=True"):
        exportable(layers)


def test_an_operator_that_breaks_a_runtime_is_refused(tmp_path: Any) -> None:
    class Places(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nonzero(x > 0).float()

    with pytest.raises(ConfigError, match=r"NonZero.*is not written"):
        export_onnx(Places(), {"x": torch.ones(3, 5)}, {"x": (3, 5), "y": ("found", 2)}, tmp_path / "a", output="y")
    assert not (tmp_path / "a").exists()
