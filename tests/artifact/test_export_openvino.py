"""OpenVINO's own files: the answers and the integer kernels of the ONNX file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.artifact.models import call
from trilevel.artifact.export.openvino import export_openvino
from trilevel.artifact.manifest import MODEL_FILE, PROBE_FILE, Artifact
from trilevel.artifact.runtime.openvino import OpenVino
from trilevel.artifact.verify import integer_kernels
from trilevel.errors import ArtifactError, MissingExtraError
from trilevel.model.folder import sha256_of

SIZES = [(1, 1), (3, 33), (2, 127)]
PRODUCTS = 4
"""Of weights in a layer."""
# exports by several workers at once take minutes on two cores
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("kind", ["mean_artifact", "dense_artifact", "int8_artifact"])
def test_equals_the_onnx_file(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    artifact: Artifact = request.getfixturevalue(kind)
    path = export_openvino(artifact, tmp_path / "made")
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.xml"]
    ours, theirs = OpenVino(artifact, threads=1, path=path), OpenVino(artifact, threads=1)
    for size in SIZES:
        inputs = {name: x.numpy() for name, x in call(*size).items()}
        np.testing.assert_array_equal(ours.run(inputs)["vector"], theirs.run(inputs)["vector"])
    is_int8 = artifact.manifest.precision == "int8"
    assert len(integer_kernels(ours)) == (PRODUCTS if is_int8 else 0)


def test_integers_stay_integers(int8_artifact: Artifact, tmp_path: Path) -> None:
    weights = 24 * 72 + 24 * 24 + 2 * 24 * 96
    stored = export_openvino(int8_artifact, tmp_path).with_suffix(".bin").stat().st_size
    assert weights < stored < 2 * weights


def test_what_cannot_be_read_or_written(mean_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(ArtifactError, match=r"cannot be written to .*folder"):
        export_openvino(mean_artifact, tmp_path / "folder")
    (tmp_path / MODEL_FILE).write_bytes(b"no graph")
    damaged = replace(mean_artifact, path=tmp_path, hashes={MODEL_FILE: sha256_of(tmp_path / MODEL_FILE)})
    with pytest.raises(ArtifactError, match="by OpenVINO"):
        export_openvino(damaged, tmp_path / "made")


def test_other_answers_are_refused(mean_artifact: Artifact, int8_artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(int8_artifact.file(MODEL_FILE).read_bytes())
    (tmp_path / PROBE_FILE).write_bytes(mean_artifact.file(PROBE_FILE).read_bytes())
    hashes = {name: sha256_of(tmp_path / name) for name in (MODEL_FILE, PROBE_FILE)}
    with pytest.raises(ArtifactError, match="gives other answers in openvino"):
        export_openvino(replace(mean_artifact, path=tmp_path, hashes=hashes), tmp_path / "made")


def test_openvino_is_missing(mean_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trilevel\[openvino\]'"):
        export_openvino(mean_artifact, tmp_path)
