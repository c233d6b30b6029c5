"""Which graphs TensorRT takes: parsed, and built into an engine, by its sibling that needs no GPU."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.artifact.installed import cached, pip_install
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.export.tensorrt import MODULES, Profile, build_engine, check_tensorrt
from trilevel.artifact.manifest import MODEL_FILE, Artifact
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.errors import ArtifactError, ConfigError, MissingExtraError

VERSION = "1.7.1.116"
PACKAGES = [f"tensorrt-rtx-cu13-{part}=={VERSION}" for part in ("libs", "bindings")]
# exports by several workers at once take minutes on two cores
pytestmark = pytest.mark.timeout(600)
PROFILE = Profile(smallest=(1, 1), usual=(1, 61), largest=(2, 127))


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT, or its sibling: of this environment, else installed once in the user's cache."""
    if not any(map(importlib.util.find_spec, MODULES)):
        folder = cached(f"tensorrt-rtx-{VERSION}", partial(pip_install, packages=PACKAGES))
        monkeypatch.syspath_prepend(folder)


def test_there_is_none(mean_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    graph = mean_artifact.file(MODEL_FILE)
    for refused in (partial(check_tensorrt, graph), partial(build_engine, graph, tmp_path / "engine", {})):
        with pytest.raises(MissingExtraError, match=r"no TensorRT.*pip install tensorrt.*--no-deps tensorrt-rtx"):
            refused()


@pytest.mark.tensorrt
@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("kind", ["mean_artifact", "dense_artifact", "int8_artifact"])
def test_parses_with_any_batch_and_length(kind: str, request: pytest.FixtureRequest) -> None:
    artifact: Artifact = request.getfixturevalue(kind)
    found = check_tensorrt(artifact.file(MODEL_FILE))
    assert found.inputs == {"input_ids": (-1, -1), "attention_mask": (-1, -1)}
    assert found.layers > 100


@pytest.mark.tensorrt
@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QuantizeConfig(activations="uint8"), "QuantizeLinear .*[Nn]on-zero zero point"),
        (QuantizeConfig(activations=None, weight_bits=4), "MatMulNBits .*must be FP16"),
    ],
    ids=["zero_point", "weights_4bit"],
)
def test_what_it_does_not_parse(config: QuantizeConfig, reason: str, tmp_path: Path) -> None:
    model = freeze(quantize(torch.nn.Sequential(torch.nn.Linear(64, 32)), config, [torch.randn(3, 64)]))
    export_onnx(model, {"x": torch.randn(3, 64)}, {"x": ("rows", 64), "y": ("rows", 32)}, tmp_path / "a", output="y")
    with pytest.raises(ArtifactError, match=f"TensorRT .* does not parse .*{reason}"):
        check_tensorrt(tmp_path / "a")


@pytest.mark.tensorrt
@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("kind", ["mean_artifact", "int8_artifact"])
def test_builds_an_engine(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    artifact: Artifact = request.getfixturevalue(kind)
    engine = tmp_path / "engine"
    build_engine(artifact.file(MODEL_FILE), engine, {"input_ids": PROFILE, "attention_mask": PROFILE})
    assert engine.stat().st_size > 10_000


@pytest.mark.tensorrt
@pytest.mark.usefixtures("tensorrt")
def test_profiles_that_do_not_fit(mean_artifact: Artifact, tmp_path: Path) -> None:
    graph = mean_artifact.file(MODEL_FILE)
    with pytest.raises(ConfigError, match=r"given for \['input_ids'\]; \['attention_mask', 'input_ids'\] need one"):
        build_engine(graph, tmp_path / "engine", {"input_ids": PROFILE})
    for wrong in ((1,), (0, 1), (2, 128)):
        own = Profile(smallest=wrong, usual=(1, 61), largest=(2, 127))
        with pytest.raises(ConfigError, match=r"the profile of 'attention_mask'.*three rising shapes"):
            build_engine(graph, tmp_path / "engine", {"input_ids": PROFILE, "attention_mask": own})
    assert not (tmp_path / "engine").exists()


@pytest.mark.tensorrt
@pytest.mark.usefixtures("tensorrt")
def test_a_graph_that_is_none(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"cannot be read.*Export"):
        check_tensorrt(tmp_path / MODEL_FILE)
