from __future__ import annotations

import csv
import errno
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.toy import BATCH, TOKENS, VOCAB, Toy, ToyBatches, config, objective
from trilevel.errors import CheckpointError, ConfigError, TrilevelError
from trilevel.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from trilevel.training.config import TrainConfig
from trilevel.training.interrupt import TrainingInterrupted
from trilevel.training.loop import FitResult, fit
from trilevel.training.optimizer import learning_rate, make_optimizer


def run(model: nn.Module, out_dir: Path, batches: Any = None, **options: Any) -> FitResult:
    settings: dict[str, Any] = {"config": config(), "show_progress": False} | options
    return fit(model, batches or ToyBatches(), settings.pop("objective", objective), out_dir=out_dir, **settings)


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class SignalAt:
    """Batches that send this process a signal while the batch of a step is drawn."""

    def __init__(self, step: int, number: int, times: int = 1) -> None:
        self.step, self.number, self.times, self.inner = step, number, times, ToyBatches()

    def batch(self, step: int) -> dict[str, Tensor]:
        if step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return self.inner.batch(step)


class DifferentTokens(ToyBatches):
    """Sequences in which no token comes twice: equal ones have equal scores, and rounding chooses among them."""

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.stack([1 + torch.randperm(VOCAB - 1, generator=generator)[:TOKENS] for _ in range(self.size)])
        return super().batch(step) | {"input_ids": ids}


# definition


def test_a_step_is_the_formula(tmp_path: Path) -> None:
    settings = config(steps=3, accumulate=2, weight_decay=0.1, warmup_steps=2, clip_norm=0.05)
    # in float64: Adam blows the rounding of a gradient that is zero, as the key bias has, up to a whole step
    model, mine = Toy(dropout=0.0).double(), Toy(dropout=0.0).double()
    batches = DifferentTokens()
    run(model, tmp_path, batches, config=settings)
    assert batches.asked == [0, 1, 2, 3, 4, 5]
    decayed = {id(p) for p in mine.parameters() if p.ndim > 1 and p is not mine.encoder.embedding.table.weight}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in mine.named_parameters()}
    for step in range(3):
        mine.zero_grad()
        losses = [objective(mine, batches.batch(2 * step + turn))["loss"] for turn in range(2)]
        (torch.stack(losses).sum() / 2).backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.05)
        rate = learning_rate(step, settings)
        with torch.no_grad():
            for name, p in mine.named_parameters():
                assert p.grad is not None
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * p.grad)
                second.mul_(0.98).add_(0.02 * p.grad**2)
                p.mul_(1 - rate * (0.1 if id(p) in decayed else 0.0))
                first_hat, second_hat = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.98 ** (step + 1))
                p.sub_(rate * first_hat / (second_hat.sqrt() + 1e-8))
    for ours, theirs in zip(mine.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_accumulating_equals_a_larger_batch(tmp_path: Path) -> None:
    class Halves:
        def batch(self, step: int) -> dict[str, Tensor]:
            whole = ToyBatches(2 * BATCH).batch(step // 2)
            return {name: tensor.chunk(2)[step % 2] for name, tensor in whole.items()}

    one, other = Toy(dropout=0.0).double(), Toy(dropout=0.0).double()
    run(one, tmp_path / "one", ToyBatches(2 * BATCH), config=config(steps=4))
    run(other, tmp_path / "other", Halves(), config=config(steps=4, accumulate=2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_learns(tmp_path: Path) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCAB, 2)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.table(ids[:, 0])
            return logits

    result = run(First(), tmp_path, ToyBatches(64), config=config(steps=40, learning_rate=0.1, log_every=10))
    assert result.step == 40
    assert result.loss < 0.3
    assert float(rows(result.log)[-1]["accuracy"]) > 0.9


# resuming


@pytest.mark.parametrize("cut", [0, 6, 9])
def test_interrupted_run_continues_bit_for_bit(tmp_path: Path, cut: int) -> None:
    whole, resumed = Toy(), Toy()
    run(whole, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted, match=f"stopped after step {cut + 1} of 11; the checkpoint .* is written"):
        run(resumed, tmp_path / "cut", SignalAt(cut, signal.SIGINT))
    # dropout is on, so a difference in random numbers would show
    fresh = Toy()
    torch.randn(17)
    result = run(fresh, tmp_path / "cut")
    assert same_bits(fresh, whole)
    assert not same_bits(fresh, resumed)
    assert result.step == 11


def test_checkpoints_on_the_way_can_be_resumed(tmp_path: Path) -> None:
    whole = Toy()
    run(whole, tmp_path / "whole", config=config(accumulate=2))

    class PowerCut(ToyBatches):
        def batch(self, step: int) -> dict[str, Tensor]:
            if step == 14:
                raise SystemError("power cut")
            return super().batch(step)

    with pytest.raises(SystemError):
        run(Toy(), tmp_path / "cut", PowerCut(), config=config(accumulate=2, checkpoint_every=3))
    assert load_checkpoint(tmp_path / "cut" / "checkpoint").state["step"] == 6
    fresh, batches = Toy(), ToyBatches()
    run(fresh, tmp_path / "cut", batches, config=config(accumulate=2, checkpoint_every=5))
    assert batches.asked[0] == 12
    assert same_bits(fresh, whole)
    assert [row["step"] for row in rows(tmp_path / "cut" / "log.csv")] == ["3", "4", "6", "8", "10", "11"]


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    model, batches = Toy(), ToyBatches()
    run(model, tmp_path)
    fresh = Toy()
    result = run(fresh, tmp_path, batches)
    assert batches.asked == []
    assert same_bits(fresh, model)
    assert math.isnan(result.loss)
    assert result.steps_per_s == 0


def test_resume_false_starts_anew(tmp_path: Path) -> None:
    run(Toy(), tmp_path, config=config(steps=2))
    batches = ToyBatches()
    run(Toy(), tmp_path, batches, config=config(steps=3), resume=False)
    assert batches.asked == [0, 1, 2]
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == ["3"]


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    run(Toy(), tmp_path)
    with pytest.raises(ConfigError, match=r"other settings: learning_rate was 0.01 and is 0.02; seed was 0 and is 1"):
        run(Toy(), tmp_path, config=config(learning_rate=0.02, seed=1))
    save_checkpoint(tmp_path / "checkpoint", model=Toy(), config={})
    with pytest.raises(ConfigError, match="was not written by training"):
        run(Toy(), tmp_path)


# stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_the_step_and_write(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    model, batches = Toy(), SignalAt(2, number)
    with pytest.raises(TrainingInterrupted, match="Run the same command again to go on"):
        run(model, tmp_path, batches)
    assert signal.getsignal(number) is before
    assert batches.inner.asked == [0, 1, 2]
    kept = Toy()
    assert load_checkpoint(tmp_path / "checkpoint", model=kept).state["step"] == 3
    assert same_bits(kept, model)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(Toy(), tmp_path, SignalAt(2, signal.SIGINT, times=2))
    assert not isinstance(caught.value, TrainingInterrupted)
    assert not (tmp_path / "checkpoint").exists()


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path: Path) -> None:
    assert run(Toy(), tmp_path, SignalAt(10, signal.SIGINT)).step == 11


def test_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingInterrupted):
        run(Toy(), tmp_path, SignalAt(2, signal.SIGINT))

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CheckpointError, match="No space left"):
            run(Toy(), tmp_path)
    whole, fresh = Toy(), Toy()
    run(whole, tmp_path / "whole")
    run(fresh, tmp_path)
    assert same_bits(fresh, whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_checkpoint(tmp_path: Path, value: float) -> None:
    def broken(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = objective(model, batch)["loss"]
        return loss * value if batch["input_ids"][0, 0] == ToyBatches().batch(5)["input_ids"][0, 0] else loss

    with pytest.raises(TrilevelError, match=r"gradient norm .* at step \d+ are not both finite. Lower learning_rate"):
        run(Toy(), tmp_path, objective=broken, config=config(checkpoint_every=2, log_every=100))
    kept = Toy()
    load_checkpoint(tmp_path / "checkpoint", model=kept)
    assert all(p.isfinite().all() for p in kept.parameters())


# what is written


def test_log_and_configuration(tmp_path: Path) -> None:
    result = run(Toy(), tmp_path)
    table = rows(result.log)
    assert [row["step"] for row in table] == ["4", "8", "11"]
    assert set(table[0]) == {"step", "loss", "accuracy", "gradient_norm", "learning_rate", "steps_per_s"}
    assert float(table[0]["learning_rate"]) == pytest.approx(learning_rate(3, config()))
    assert read_config(result.checkpoint) == Toy().config.to_dict()
    run(Toy(), tmp_path / "named", model_config={"kind": "toy"})
    assert read_config(tmp_path / "named" / "checkpoint") == {"kind": "toy"}
    run(nn.Linear(3, 2), tmp_path / "plain", objective=lambda model, _: model(torch.ones(1, 3)).sum())
    assert read_config(tmp_path / "plain" / "checkpoint") == {}


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(Toy(), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_evaluation_runs_at_checkpoints_and_changes_nothing(tmp_path: Path) -> None:
    modes: list[bool] = []

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        modes.append(model.training or torch.is_grad_enabled())
        torch.randn(3)
        return {"accuracy": 0.5}

    watched, plain = Toy(), Toy()
    result = run(watched, tmp_path / "watched", evaluate=evaluate, config=config(checkpoint_every=6))
    run(plain, tmp_path / "plain")
    assert modes == [False, False]
    assert same_bits(watched, plain)
    assert [row["evaluation_accuracy"] for row in rows(result.log)] == ["", "0.5", "", "0.5"]


def test_bf16_keeps_float32_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilevel.training.loop.has_fast_products", lambda _dtype: True)
    types: list[torch.dtype] = []

    def watch(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        handle = model.get_submodule("head.logits").register_forward_hook(lambda _, __, out: types.append(out.dtype))
        loss = objective(model, batch)["loss"]
        handle.remove()
        return loss

    model = Toy()
    run(model, tmp_path, config=config(precision="bf16-mixed"), objective=watch)
    assert set(types) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_bf16_without_hardware_is_said_to_be_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trilevel.training.loop.has_fast_products", lambda _dtype: False)
    with pytest.warns(UserWarning, match="on a processor without bfloat16"):
        run(Toy(), tmp_path, config=config(steps=1, precision="bf16-mixed"))


def test_progress_shows_steps_and_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Toy(), tmp_path, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "11/11" in captured.err
    assert "loss " in captured.err


# parts


def test_no_decay_for_norms_biases_embeddings() -> None:
    model = Toy()
    decayed, others = make_optimizer(model, config(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all("norm" not in names[id(p)] and "bias" not in names[id(p)] for p in decayed["params"])
    assert "encoder.embedding.table.weight" in {names[id(p)] for p in others["params"]}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    model = Toy()
    model.encoder.requires_grad_(False)
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    run(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in model.encoder.named_parameters())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "steps=0 must be >= 1"),
        ({"accumulate": 0}, "accumulate=0 must be >= 1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be >= 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be >= 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be > 0"),
        ({"final_fraction": 1.5}, r"final_fraction=1.5 must lie in \[0, 1\]"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be > 0; None clips nothing"),
        ({"precision": "16"}, "precision='16' is neither"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TrainConfig(**({"steps": 3} | change))


def test_the_gradient_can_stay_unclipped(tmp_path: Path) -> None:
    result = run(Toy(), tmp_path, config=config(clip_norm=None))
    assert "gradient_norm" not in rows(result.log)[0]


def test_plain_tensor_objective(tmp_path: Path) -> None:
    def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"]), batch["labels"])

    assert run(Toy(), tmp_path, objective=plain).loss > 0
