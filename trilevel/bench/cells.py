"""One training run of `trilevel bench levels`, and the file of finished ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trilevel.attention.levels import Levels
from trilevel.data.synthetic import MajorityTask, RecallTask, TaskBatch
from trilevel.errors import InputError
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

DIM, HEADS, LAYERS = 80, 10, 2
EVALUATE_EVERY = 25
PERFECT_EVALUATIONS = 3
# batches of these seeds never meet a training seed
VALIDATION_SEED, TEST_SEED = 7_000_001, 7_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: a task, a variant of the levels, a seed and a budget.

    `pool_rate` multiplies the learning rate of the pooling weights: they start at zero, have as few numbers as a head
    has features, and a summary shows one token among many only once they have grown large.
    """

    name: str
    task: RecallTask | MajorityTask
    variant: str
    seed: int
    levels: Levels | None
    steps: int
    batch_size: int
    learning_rate: float
    pool_rate: float
    test_samples: int

    @property
    def key(self) -> str:
        """Changes with anything that changes the run's result."""
        text = f"{self!r} {DIM} {HEADS} {LAYERS} {EVALUATE_EVERY} {PERFECT_EVALUATIONS} {torch.__version__}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Accuracy (0 to 1) of a finished run on fresh test data, and the steps it took."""

    key: str
    task: str
    variant: str
    seed: int
    accuracy: float
    steps: int

    def append_to(self, path: Path) -> None:
        """Add a line to the file of finished runs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(self)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """Finished runs by key; a last line that was cut off is passed over.

    Raises:
        InputError: another line is no outcome.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    found: dict[str, Outcome] = {}
    for number, line in enumerate(lines, 1):
        try:
            outcome = Outcome(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number} is no finished run ({error}). Delete the file to start anew.") from error
        found[outcome.key] = outcome
    return found


class _Classifier(nn.Module):
    """Encoder and a linear map of the tokens that are asked."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        config = EncoderConfig(
            vocab_size=cell.task.vocab_size, dim=DIM, num_heads=HEADS, num_layers=LAYERS, levels=cell.levels
        )
        self.encoder = Encoder(config)
        self.logits = nn.Linear(DIM, cell.task.num_classes)

    def forward(self, batch: TaskBatch) -> Tensor:
        """Logits (batch, answers, classes)."""
        hidden = self.encoder(batch.input_ids)
        logits: Tensor = self.logits(hidden.gather(1, batch.positions[..., None].expand(-1, -1, DIM)))
        return logits


def train_cell(cell: Cell) -> Outcome:
    """Train from scratch; ends early once several evaluations in a row are perfect."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    model = _Classifier(cell)
    optimizer = _optimizer(model, cell)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, cell.steps))
    perfect = 0
    step = 0
    while step < cell.steps and perfect < PERFECT_EVALUATIONS:
        batch = cell.task.batch(cell.batch_size, seed=cell.seed, step=step)
        loss = F.cross_entropy(model(batch).flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % EVALUATE_EVERY == 0:
            perfect = perfect + 1 if _accuracy(model, cell, 256, VALIDATION_SEED) == 1 else 0
    accuracy = _accuracy(model, cell, cell.test_samples, TEST_SEED)
    return Outcome(key=cell.key, task=cell.name, variant=cell.variant, seed=cell.seed, accuracy=accuracy, steps=step)


def _optimizer(model: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    pooling = [weight for name, weight in model.named_parameters() if name.endswith("pool_weight")]
    others = [weight for name, weight in model.named_parameters() if not name.endswith("pool_weight")]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": pooling, "lr": cell.learning_rate * cell.pool_rate}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cell.learning_rate, weight_decay=0.01)


def _rate(step: int, steps: int) -> float:
    """Warm-up over 50 steps, then constant, linear to zero over the last third."""
    return min(1.0, (step + 1) / 50, max(0.0, 3 * (steps - step) / steps))


@torch.no_grad()
def _accuracy(model: nn.Module, cell: Cell, samples: int, seed: int) -> float:
    right = total = 0
    for step in range(-(-samples // 256)):
        batch = cell.task.batch(min(samples, 256), seed=seed, step=step)
        right += int((model(batch).argmax(-1) == batch.labels).sum())
        total += batch.labels.numel()
    return right / total
