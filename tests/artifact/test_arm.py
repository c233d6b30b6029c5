"""Artifacts on ARM: numpy, ONNX Runtime and this package alone give the answers of torch on x86, in integer kernels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.artifact.emulated import CPUS, emulated
from trilevel.artifact.manifest import Artifact
from trilevel.attention.native import build

pytestmark = [pytest.mark.arm, pytest.mark.timeout(600)]

PROGRAM = """
import json, platform, sys
from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.runtime.predictor import load_predictor
from trilevel.artifact.verify import check_probes, integer_kernels
artifact = read_artifact(sys.argv[1])
predictor = load_predictor(artifact, "onnxruntime", threads=1)
found = check_probes(artifact, predictor)
print(json.dumps({
    "machine": platform.machine(),
    "difference": found.difference,
    "kernels": sorted(integer_kernels(predictor).values()),
    "torch": "torch" in sys.modules,
}))
"""


@pytest.mark.parametrize("cpu", CPUS)
def test_answers_and_kernels(cpu: str, mean_artifact: Artifact, int8_artifact: Artifact) -> None:
    python = emulated(cpu)
    for artifact in (mean_artifact, int8_artifact):
        found = json.loads(python.run(PROGRAM, str(artifact.path)))
        assert found["machine"] == "aarch64"
        assert not found["torch"]
        is_int8 = artifact.manifest.precision == "int8"
        # an int8 model may round a value to the step beside it, which check_probes allows for
        assert is_int8 or found["difference"] < 1e-5
        assert found["kernels"] == (["MatMulIntegerToFloat"] * 4 if is_int8 else [])


@pytest.mark.parametrize("cpu", CPUS)
def test_attention_by_the_native_kernels(cpu: str, native_artifact: Artifact, tmp_path: Path) -> None:
    python, compiler = emulated(cpu), shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs aarch64-linux-gnu-g++: apt install g++-aarch64-linux-gnu")
    error = build.compile_library([compiler], (*build.FLAGS, build.THREADS), tmp_path / build.library_name("neon"))
    assert error is None
    place = "from pathlib import Path\nfrom trilevel.attention import library\nlibrary.FOLDER = Path(sys.argv[2])\n"
    program = PROGRAM.replace("artifact = ", f"{place}artifact = ", 1)
    found = json.loads(python.run(program, str(native_artifact.path), str(tmp_path)))
    assert (found["machine"], found["torch"]) == ("aarch64", False)
    assert found["difference"] < 1e-5
