"""`trilevel bench listops`: the Long Range Arena's ListOps under each variant of the levels. Meant for a GPU."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.bench.harness import Progress, Report, write_json
from trilevel.data.listops import VOCABULARY, ListOps, Split
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder
from trilevel.model.heads import SequenceHead
from trilevel.training.config import TrainConfig
from trilevel.training.loop import fit
from trilevel.training.objectives import sequence_loss

PUBLISHED = {"local attention": 15.8, "Longformer": 35.6, "BigBird": 36.1, "full attention": 36.4}
"""Test accuracy in per cent, Tay et al., arXiv 2011.04006, table 1: for comparison, never measured here."""
NUM_CLASSES = 10
FOLDER = Path("out/bench/listops")


def variant_levels() -> dict[str, Levels | None]:
    """Variants on up to 2,000 tokens: window 33, regions of 32, 32 global tokens; None is dense."""

    def with_ratio(*shares: int, mode: Literal["calibrated", "strict"] = "calibrated") -> Levels:
        return Levels(ratio=LevelRatio(*shares), window=33, region_size=32, num_global_tokens=32, mode=mode)

    return {
        "calibrated": with_ratio(6, 3, 1),
        "dense": None,
        "local": with_ratio(1, 0, 0),
        "strict": with_ratio(6, 3, 1, mode="strict"),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOpsCase:
    """What is trained: the arena's sizes (96,000 training samples, 6 layers of 512, 5,000 steps of 32).

    Args:
        variants: names of `variant_levels`.
        folder: a folder for each variant, with its checkpoint and log; finished variants are not trained again.
        micro_batch: samples that go through the model at once; the rest of a batch is accumulated.
    """

    data: ListOps = field(default_factory=ListOps)
    variants: tuple[str, ...] = ("calibrated", "dense", "local", "strict")
    folder: Path = FOLDER
    train_samples: int = 96_000
    test_samples: int = 2_000
    steps: int = 5_000
    micro_batch: int = 32
    accumulate: int = 1
    learning_rate: float = 3e-4
    dim: int = 512
    heads: int = 8
    layers: int = 6
    seed: int = 0
    accelerator: str = "auto"

    @staticmethod
    def smoke(folder: Path) -> ListOpsCase:
        """Two steps on short expressions with a tiny model on the CPU."""
        return ListOpsCase(
            data=ListOps(min_length=10, max_length=60), folder=folder, train_samples=16, test_samples=8, steps=2,
            micro_batch=4, dim=40, heads=10, layers=1, accelerator="cpu",
        )  # fmt: skip


class _Classifier(nn.Module):
    """Encoder, mean of the tokens, logits of the ten digits."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = SequenceHead(config.dim, NUM_CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (batch, 10)."""
        hidden = self.encoder(batch["input_ids"], padding_mask=batch["padding_mask"])
        logits: Tensor = self.head(hidden, padding_mask=batch["padding_mask"])
        return logits


@dataclass(frozen=True, slots=True)
class _Batches:
    """Training samples in an order that is shuffled anew in each epoch; batch n is a function of n alone."""

    case: ListOpsCase

    def batch(self, step: int) -> dict[str, Tensor]:
        size, total = self.case.micro_batch, self.case.train_samples
        return self.case.data.batch("train", [_shuffled(step * size + place, total) for place in range(size)])


def _shuffled(number: int, total: int) -> int:
    """A permutation of `total` in each epoch, without storing it: an affine map with a multiplier prime to `total`."""
    epoch, place = divmod(number, total)
    rng = random.Random(f"listops-order:{total}:{epoch}")
    multiplier = rng.randrange(1, total + 1)
    while math.gcd(multiplier, total) != 1:
        multiplier = rng.randrange(1, total + 1)
    return (place * multiplier + rng.randrange(total)) % total


def has_gpu() -> bool:
    """Whether CUDA is there; without it the full case takes days."""
    return torch.cuda.is_available()


def run(case: ListOpsCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Train and test each variant; an interrupted run goes on from its last checkpoint."""
    rows = []
    for place, name in enumerate(case.variants):
        progress(f"ListOps, {name}", place / len(case.variants))
        rows.append(_finished(case, name) or _train(case, name))
    published = [{"variant": f"{name} (published)", "accuracy_percent": value} for name, value in PUBLISHED.items()]
    return Report(case="listops", rows=[*rows, *published], settings=_settings(case))


def _settings(case: ListOpsCase) -> dict[str, Any]:
    values = dataclasses.asdict(case)
    return {name: value for name, value in values.items() if name not in ("folder", "variants", "accelerator")}


def _finished(case: ListOpsCase, name: str) -> dict[str, Any] | None:
    path = case.folder / name / "result.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    row: dict[str, Any] | None = kept["row"] if kept["settings"] == _settings(case) else None
    return row


def _train(case: ListOpsCase, name: str) -> dict[str, Any]:
    torch.manual_seed(case.seed)
    levels = variant_levels()[name]
    model = _Classifier(
        EncoderConfig(
            vocab_size=len(VOCABULARY), dim=case.dim, num_heads=case.heads, num_layers=case.layers, levels=levels
        )
    )
    on_gpu = case.accelerator != "cpu" and has_gpu()
    config = TrainConfig(
        steps=case.steps, learning_rate=case.learning_rate, warmup_steps=min(500, case.steps // 10),
        accumulate=case.accumulate, precision="bf16-mixed" if on_gpu else "32-true", seed=case.seed,
        checkpoint_every=250, accelerator="cuda" if on_gpu else "cpu",
    )  # fmt: skip
    result = fit(model, _Batches(case), _loss, config=config, out_dir=case.folder / name, show_progress=True)
    row = {
        "variant": name,
        "accuracy_percent": 100 * accuracy(model, case, "test"),
        "steps": case.steps,
        "steps_per_s": result.steps_per_s,
    }
    write_json(case.folder / name / "result.json", {"row": row, "settings": _settings(case)})
    return row


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return sequence_loss(model(batch), batch["labels"])


@torch.no_grad()
def accuracy(model: nn.Module, case: ListOpsCase, split: Split) -> float:
    """Share of right answers on the first `test_samples` of a split."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    for start in range(0, case.test_samples, case.micro_batch):
        batch = case.data.batch(split, range(start, min(start + case.micro_batch, case.test_samples)))
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        right += int((model(batch).argmax(-1) == batch["labels"]).sum())
    return right / case.test_samples
