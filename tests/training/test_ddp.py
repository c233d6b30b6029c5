"""Two processes on one CPU (gloo) train as one process with twice the batches does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.ddp_script import STEPS
from tests.training.toy import Toy, ToyBatches, config, objective
from trilevel.model.checkpoint import load_checkpoint
from trilevel.training.loop import fit

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote; one launch for all tests, as starting them takes most of the time."""
    where = tmp_path_factory.mktemp("ddp")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.training.ddp_script", str(where)],
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return where


def weights(run: Path) -> list[torch.Tensor]:
    model = Toy().double()
    assert load_checkpoint(run / "checkpoint", model=model).state["step"] == STEPS
    return [p.detach() for p in model.parameters()]


def test_two_processes_equal_one_with_twice_the_batches(folder: Path, tmp_path: Path) -> None:
    alone = Toy(dropout=0.0).double()
    settings = config(steps=STEPS, accumulate=2)
    fit(alone, ToyBatches(), objective, config=settings, out_dir=tmp_path, show_progress=False)
    for ours, theirs in zip(weights(folder / "plain"), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_signal_to_one_process_stops_both_after_the_same_step(folder: Path) -> None:
    for rank in range(2):
        assert "stopped after step 4 of 6" in (folder / f"interrupted-{rank}").read_text()


def test_resumed_processes_continue_bit_for_bit(folder: Path) -> None:
    assert all(map(torch.equal, weights(folder / "cut"), weights(folder / "whole")))
