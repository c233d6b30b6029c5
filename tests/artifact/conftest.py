"""Artifacts that all workers of a test run share, as an export takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.artifact import tasks
from tests.artifact.models import write_mean
from trilevel.artifact.manifest import Artifact, is_artifact, read_artifact


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder of this run alone."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def _made_once(shared_folder: Path, name: str, **kind: bool) -> Artifact:
    with FileLock(shared_folder / f"{name}.lock"):
        folder = shared_folder / name
        return read_artifact(folder) if is_artifact(folder) else write_mean(folder, **kind)


@pytest.fixture(scope="session")
def mean_artifact(shared_folder: Path) -> Artifact:
    """Two layers with local, regional and global heads."""
    return _made_once(shared_folder, "mean")


@pytest.fixture(scope="session")
def dense_artifact(shared_folder: Path) -> Artifact:
    """The same with dense attention."""
    return _made_once(shared_folder, "mean-dense", is_dense=True)


@pytest.fixture(scope="session")
def int8_artifact(shared_folder: Path) -> Artifact:
    """One layer, with integer weights and activations."""
    return _made_once(shared_folder, "mean-int8", is_int8=True)


@pytest.fixture(scope="session")
def native_artifact(shared_folder: Path) -> Artifact:
    """Two layers whose attention is an operator of the native kernels."""
    return _made_once(shared_folder, "mean-native", is_native=True)


@pytest.fixture(scope="session")
def task_artifact(shared_folder: Path) -> Callable[[str], Artifact]:
    """An artifact: `embedding`, `classification`, `images`, `int8` (a classifier of texts) or `small-images`."""

    def made(kind: str) -> Artifact:
        with FileLock(shared_folder / f"task-{kind}.lock"):
            folder = shared_folder / f"task-{kind}"
            return read_artifact(folder) if is_artifact(folder) else tasks.write(kind, folder)

    return made
