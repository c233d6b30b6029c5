from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from trilevel.applications.documents.checkpoint import MINILM, PRETRAINED
from trilevel.applications.images.checkpoint import KIND
from trilevel.applications.kinds import kind_of
from trilevel.errors import CheckpointError
from trilevel.model.checkpoint import save_checkpoint


def test_shipped_models_are_of_documents() -> None:
    assert kind_of(PRETRAINED) == kind_of(str(MINILM)) == "documents"


@pytest.mark.parametrize(("key", "kind"), [(KIND, "images"), ("classifier", "classification")])
def test_runs_are_told_apart(key: str, kind: str, tmp_path: Path) -> None:
    _write(tmp_path, key)
    assert kind_of(tmp_path) == kind


def _write(folder: Path, key: str) -> None:
    save_checkpoint(folder / "checkpoint", model=nn.Linear(2, 3), config={key: {}})


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_other_folders_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model of trilevel's"):
        kind_of(tmp_path / name)
    _write(tmp_path / "other", "something")
    with pytest.raises(CheckpointError, match="holds no model of trilevel's"):
        kind_of(tmp_path / "other")
