"""The training loop: Lightning Fabric underneath, checkpoints that continue bit for bit, a log, a progress bar."""

from __future__ import annotations

import atexit
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trilevel.attention.near import has_fast_products
from trilevel.errors import ConfigError, TrilevelError, require
from trilevel.model.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from trilevel.training.config import TrainConfig
from trilevel.training.interrupt import StopRequest, TrainingInterrupted
from trilevel.training.log import TrainingLog
from trilevel.training.optimizer import learning_rate, make_optimizer
from trilevel.training.progress import ProgressBar

CHECKPOINT_FOLDER = "checkpoint"


class Batches(Protocol):
    """Where batches come from."""

    def batch(self, step: int) -> Any:
        """Batch number `step`, tensors in any nesting of mappings, sequences and dataclasses.

        The same number gives the same batch at any time, so a resumed run needs no state of an iterator. Numbers run
        through accumulation and processes: a step takes `accumulate * devices` of them.
        """
        ...


Objective = Callable[[nn.Module, Any], "Tensor | Mapping[str, Tensor]"]
"""Loss of a model on a batch: a scalar, or a mapping with `loss` and further scalars for the log."""

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """What training did.

    Attributes:
        step: steps done in all, those before a resume included.
        loss: mean of the last logged steps; nan if the run had nothing left to do.
        checkpoint: folder of the last checkpoint.
        log: the CSV file.
        seconds: wall time of this run.
        steps_per_s: of this run.
    """

    step: int
    loss: float
    checkpoint: Path
    log: Path
    seconds: float
    steps_per_s: float


def fit(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    *,
    config: TrainConfig,
    out_dir: str | Path,
    model_config: Mapping[str, Any] | None = None,
    resume: bool = True,
    evaluate: Evaluate | None = None,
    show_progress: bool = True,
) -> FitResult:
    """Train `model` in place; on one CPU, an interrupted and resumed run ends with the same bits as one that was not.

    Writes `out_dir/checkpoint`, `out_dir/log.csv` and, where TensorBoard is installed, `out_dir/tensorboard`. Torch's
    generator is seeded from (seed, step, process) before each step.

    Args:
        model: its forward is called through Fabric, which casts (bf16) and averages gradients (DDP), so the objective
            calls the module it is given and nothing behind it.
        batches: the data, by number.
        objective: loss of a batch.
        config: steps, optimizer, devices.
        out_dir: folder of the run.
        model_config: saved with the weights, to build the model again; default: its own `config`, if it has one.
        resume: continue from the checkpoint in `out_dir` if there is one; False starts anew and overwrites it.
        evaluate: called at each checkpoint, in evaluation mode without gradients; its numbers go to the log.
        show_progress: draw a bar on standard error.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
        ConfigError: the checkpoint to resume was trained with other settings.
        CheckpointError: it is damaged or of another model, or the disk is full.
        TrilevelError: loss or gradient is not finite; the last checkpoint is unharmed.
    """
    run = _Run(
        model, batches, objective, config=config, out_dir=Path(out_dir), model_config=_config_of(model, model_config)
    )
    start = run.resume() if resume else 0
    is_main = run.fabric.is_global_zero
    log = TrainingLog(run.out_dir, start_step=start) if is_main else None
    began = time.perf_counter()
    try:
        with (
            StopRequest() as stop,
            ProgressBar(steps=config.steps, start_step=start, is_shown=show_progress and is_main) as bar,
        ):
            run.train(start, stop, bar, log, evaluate)
    finally:
        if log is not None:
            log.close()
    seconds = time.perf_counter() - began
    return FitResult(
        step=max(start, config.steps),
        loss=run.last_loss,
        checkpoint=run.checkpoint,
        log=run.out_dir / "log.csv",
        seconds=seconds,
        steps_per_s=(config.steps - start) / seconds if config.steps > start else 0.0,
    )


class _Run:
    """One training run: what does not change from step to step, and the running means for the log."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        objective: Objective,
        *,
        config: TrainConfig,
        out_dir: Path,
        model_config: Mapping[str, Any],
    ) -> None:
        self.config, self.batches, self.objective = config, batches, objective
        self.out_dir, self.checkpoint = out_dir, out_dir / CHECKPOINT_FOLDER
        self.module, self.model_config = model, model_config
        self.fabric = _make_fabric(config)
        _launch(self.fabric)
        _seed_everything(config.seed + self.fabric.global_rank)
        model.train()
        self.optimizer = make_optimizer(model, config)
        self.wrapped, self.wrapped_optimizer = self.fabric.setup(model, self.optimizer)
        self.sums: dict[str, Tensor] = {}
        self.steps_summed = 0
        self.gradient_norm: Tensor | None = None
        self.last_loss = math.nan

    def resume(self) -> int:
        """Continue from the checkpoint if there is one; the steps done."""
        if not has_checkpoint(self.checkpoint):
            return 0
        saved = load_checkpoint(self.checkpoint).state
        _check_course(saved, self.config, self.checkpoint)
        load_checkpoint(self.checkpoint, model=self.module, optimizer=self.optimizer, restore_random=True)
        return int(saved["step"])

    def train(
        self, start: int, stop: StopRequest, bar: ProgressBar, log: TrainingLog | None, evaluate: Evaluate | None
    ) -> None:
        """All steps from `start`, counted from 0."""
        every = self.config.checkpoint_every
        logged_at = time.perf_counter()
        text = ""
        for step in range(start, self.config.steps):
            self.step(step)
            done = step + 1
            is_last = done == self.config.steps
            is_stopped = self.any_process(stop.is_set) and not is_last
            is_saved = is_last or is_stopped or (every is not None and done % every == 0)
            if is_last or done % self.config.log_every == 0 or is_saved:
                steps = self.steps_summed
                values = self.take_means(done)
                if is_saved and not is_stopped and evaluate is not None:
                    values |= self.evaluate(evaluate)
                now = time.perf_counter()
                values["steps_per_s"], logged_at = steps / (now - logged_at), now
                text = f"loss {values['loss']:.4f}"
                if log is not None:
                    log.write(done, values)
            if is_saved:
                self.save(done)
            bar.update(done, text)
            if is_stopped:
                raise TrainingInterrupted(
                    f"training stopped after step {done} of {self.config.steps}; the checkpoint {self.checkpoint} is "
                    "written. Run the same command again to go on from there."
                )

    def step(self, step: int) -> None:
        """One optimizer step over `accumulate` batches."""
        config, fabric = self.config, self.fabric
        # every step has a seed of its own, so each process draws its own dropout and resumes without a state to keep
        torch.manual_seed((config.seed * 1_000_003 + step) * 4_099 + fabric.global_rank)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        for turn in range(config.accumulate):
            number = (step * config.accumulate + turn) * fabric.world_size + fabric.global_rank
            batch = fabric.to_device(self.batches.batch(number))
            with fabric.no_backward_sync(self.wrapped, enabled=turn < config.accumulate - 1):
                losses = self.objective(self.wrapped, batch)
                named = {"loss": losses} if isinstance(losses, Tensor) else losses
                fabric.backward(named["loss"] / config.accumulate)
            self.add(named)
        if config.clip_norm is not None:
            self.gradient_norm = fabric.clip_gradients(
                self.wrapped, self.wrapped_optimizer, max_norm=config.clip_norm, error_if_nonfinite=False
            )
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        self.steps_summed += 1

    def add(self, named: Mapping[str, Tensor]) -> None:
        """Add scalars to the running means without waiting for the device."""
        for name, value in named.items():
            value = value.detach().float() / self.config.accumulate
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take_means(self, done: int) -> dict[str, float]:
        """Means since the last call, over all processes, and what else the log shows; clears them."""
        means = {name: value / self.steps_summed for name, value in self.sums.items()}
        if self.fabric.world_size > 1:
            means = {name: self.fabric.all_reduce(value, reduce_op="mean") for name, value in means.items()}
        values = {name: float(value) for name, value in means.items()}
        if self.gradient_norm is not None:
            values["gradient_norm"] = float(self.gradient_norm)
        if not all(math.isfinite(values[name]) for name in ("loss", "gradient_norm") if name in values):
            raise TrilevelError(
                f"loss {values['loss']} and gradient norm {values.get('gradient_norm')} at step {done} are not both "
                "finite. Lower learning_rate, lengthen warmup_steps, or look for bad values in the data."
            )
        self.sums, self.steps_summed, self.last_loss = {}, 0, values["loss"]
        return values | {"learning_rate": learning_rate(done - 1, self.config)}

    def evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        """Numbers of the user's evaluation, in evaluation mode."""
        self.module.eval()
        try:
            with torch.no_grad():
                return {f"evaluation_{name}": float(value) for name, value in evaluate(self.module).items()}
        finally:
            self.module.train()

    def save(self, done: int) -> None:
        """Write the checkpoint, by one process, the others wait."""
        if self.fabric.is_global_zero:
            save_checkpoint(
                self.checkpoint,
                model=self.module,
                config=self.model_config,
                optimizer=self.optimizer,
                state={"step": done, "course": self.config.course()},
            )
        self.fabric.barrier()

    def any_process(self, flag: bool) -> bool:
        """Whether any process has the flag: all must stop after the same step."""
        if self.fabric.world_size == 1:
            return flag
        asked = torch.tensor(float(flag), device=self.fabric.device)
        return bool(self.fabric.all_reduce(asked, reduce_op="sum") > 0)


def _make_fabric(config: TrainConfig) -> Any:
    fabric = require("lightning_fabric", extra="train")
    strategy = config.strategy
    if strategy == "auto" and config.devices > 1:
        # when a window covers the whole input the scorer is not used; ddp must not wait for its gradient
        strategy = "ddp_find_unused_parameters_true"
    made = fabric.Fabric(
        accelerator=config.accelerator, devices=config.devices, strategy=strategy, precision=config.precision
    )
    if config.precision == "bf16-mixed" and made.device.type == "cpu" and not has_fast_products(torch.bfloat16):
        warnings.warn(
            "precision='bf16-mixed' on a processor without bfloat16: steps take about ten times as long as with "
            "'32-true'.",
            stacklevel=2,
        )
    return made


def _launch(fabric: Any) -> None:
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    fabric.launch()
    if fabric.world_size > 1 and not known:
        # a process that ends with its connections open can abort one that is still closing its own; not earlier, for
        # a group that is gone cannot be made again under torchrun and a second fit needs it
        atexit.register(torch.distributed.destroy_process_group)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code draws from the global generator
    torch.manual_seed(seed)


def _config_of(model: nn.Module, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if given is not None:
        return given
    to_dict = getattr(getattr(model, "config", None), "to_dict", dict)
    values: Mapping[str, Any] = to_dict()
    return values


def _check_course(state: Mapping[str, Any], config: TrainConfig, checkpoint: Path) -> None:
    saved, wanted = state.get("course"), config.course()
    if not isinstance(saved, dict) or not isinstance(state.get("step"), int):
        raise ConfigError(
            f"{checkpoint} was not written by training, so it cannot be resumed. Choose another out_dir, or start anew "
            "with resume=False."
        )
    changed = [
        f"{name} was {saved.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(set(saved) | set(wanted))
        if saved.get(name) != wanted.get(name)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint} was trained with other settings: {'; '.join(changed)}. Use the same ones, choose another "
            "out_dir, or start anew with resume=False."
        )
