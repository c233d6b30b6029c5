"""What every test shares: one thread, deterministic algorithms, a fixed seed, and the data folder when there is one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

SEED = 20_241


def pytest_configure(config: pytest.Config) -> None:
    """Fix what makes results depend on the machine, before any test module is imported."""
    if not torch.cuda.is_available():
        # impl="triton" then runs in Triton's interpreter; read once, when triton or a part of torch imports it
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    # fills torch.empty with NaN as well, so an output that nobody wrote shows
    torch.use_deterministic_algorithms(True)
    # the same examples on each run: a failure is one of the code, never of the day
    settings.register_profile("trilevel", deadline=None, derandomize=True)
    settings.load_profile("trilevel")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, numpy and torch the same way before each test."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - third-party code draws from the global generator
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets that `TRILEVEL_DATA` names; the test is skipped when there is none."""
    given = os.environ.get("TRILEVEL_DATA")
    if not given:
        pytest.skip("TRILEVEL_DATA is not set; it names the folder that holds docs/, images/, ...")
    folder = Path(given)
    if not folder.is_dir():
        pytest.skip(f"TRILEVEL_DATA={given} is no folder")
    return folder


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """No calibration of the user's: what `impl="auto"` runs is the same on every machine."""
    from trilevel.attention import calibration

    monkeypatch.setattr(calibration, "folder", lambda: Path("/nonexistent/trilevel"))
    calibration.forget()
