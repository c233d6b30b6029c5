"""ExecuTorch programs: torch's answers for the shapes they were made for, with levels and without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.artifact.models import LEVELS, Mean, call, int8_model
from trilevel.artifact.export.executorch import export_executorch
from trilevel.attention.levels import Levels
from trilevel.errors import ConfigError, MissingExtraError


def test_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trilevel\[executorch\]'"):
        export_executorch(torch.nn.Linear(3, 5), {"x": torch.ones(2, 3)}, tmp_path / "model.pte")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("levels", [LEVELS, None])
def test_answers_of_torch(levels: Levels | None, tmp_path: Path) -> None:
    runtime = pytest.importorskip("executorch.runtime").Runtime.get()
    model, path = Mean(levels, num_layers=1).eval(), tmp_path / "model.pte"
    export_executorch(model, call(2, 61), path)
    inputs = call(2, 61)
    with torch.no_grad():
        wanted = model(**inputs)
    found = runtime.load_program(str(path)).load_method("forward").execute(tuple(inputs.values()))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_integers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    with pytest.raises(ConfigError, match=r"has no trilevel\.dequantize.*Give the float model"):
        export_executorch(int8_model(), call(2, 61), tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())
