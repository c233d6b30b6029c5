"""Run by test_ddp under torchrun, in two processes on the CPU: train, be interrupted, resume."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.toy import Toy, ToyBatches, config, objective
from trilevel.training.interrupt import TrainingInterrupted
from trilevel.training.loop import fit

STEPS = 6


class SignalInOne(ToyBatches):
    """Batch 7 is the fourth of the second process; the first one gets no signal."""

    def batch(self, step: int) -> Any:
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return super().batch(step)


def train(out_dir: Path, batches: ToyBatches, *, dropout: float) -> None:
    """One run over all steps, or up to the signal."""
    settings = config(steps=STEPS, devices=2)
    fit(Toy(dropout=dropout).double(), batches, objective, config=settings, out_dir=out_dir, show_progress=False)


def main(folder: Path) -> None:
    """Leave four checkpoints."""
    torch.set_num_threads(1)
    train(folder / "plain", ToyBatches(), dropout=0.0)
    train(folder / "whole", ToyBatches(), dropout=0.2)
    try:
        train(folder / "cut", SignalInOne(), dropout=0.2)
    except TrainingInterrupted as interruption:
        (folder / f"interrupted-{os.environ['RANK']}").write_text(str(interruption))
    train(folder / "cut", ToyBatches(), dropout=0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
