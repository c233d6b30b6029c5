"""The native kernels' part of `trilevel bench attention`: training, scaling, and the bars of issue 3."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trilevel.bench.contenders import Contender
from trilevel.bench.harness import Bar, Gate, check, interleave
from trilevel.bench.problem import Problem, window_rows
from trilevel.errors import TrilevelError

Row = dict[str, Any]
MakeRow = Callable[[Contender, str, int], Row]
TRAINING = "float32, forward + backward"
LOCAL, CALIBRATED, COPY = "trilevel native local", "trilevel native calibrated", "copy of q, k, v, o"
BAR_TOKENS, SHORT_TOKENS = 8_192, 512


def training_rows(contenders: list[Contender], problem: Problem, *, budget_s: float, row: MakeRow) -> list[Row]:
    """Forward and backward of every contender that computes the near window alone."""
    rows, runs = [], {}
    for contender in contenders:
        if not _is_window(contender):
            continue
        made = row(contender, TRAINING, problem.tokens)
        rows.append(made)
        if contender.absence is not None:
            made.update(status="absent", reason=contender.absence)
            continue
        # what other packages deprecate is not ours to report
        with warnings.catch_warnings(action="ignore"):
            step = _admit(contender, problem, made)
        if step is not None:
            runs[contender.name] = step
    with warnings.catch_warnings(action="ignore"):
        timings = interleave(runs, budget_s=budget_s, warm_up=1)
    for made in rows:
        if made["contender"] in timings:
            made.update(timings[made["contender"]].to_dict())
    return rows


def _is_window(contender: Contender) -> bool:
    return contender.matches == "local" or contender.name in ("trilevel local", LOCAL)


def _admit(contender: Contender, problem: Problem, made: Row) -> Callable[[], object] | None:
    """A training step whose gradients were checked; None, with the reason in `made`, if it is not to be timed."""
    leaves = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    upstream = torch.randn(problem.query.shape, generator=torch.Generator().manual_seed(1))
    try:
        with torch.enable_grad():
            call = contender.build(dataclasses.replace(problem, query=leaves[0], key=leaves[1], value=leaves[2]))

        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            with torch.enable_grad():
                call().backward(upstream)

        step()
    except (RuntimeError, ValueError, TypeError, ImportError, TrilevelError) as error:
        told = str(error).splitlines()[0][:160] if str(error) else ""
        made.update(status="failed", reason=f"raised {type(error).__name__}: {told}")
        return None
    if any(leaf.grad is None for leaf in leaves):
        made.update(status="failed", reason="gives no gradient")
        return None
    gate = _gradient_gate(problem, [leaf.grad for leaf in leaves if leaf.grad is not None], upstream)
    made.update(error=gate.error, limit=gate.limit, status="measured")
    if gate.passed:
        return step
    made.update(status="failed", reason=f"gradient error {gate.error:.1e} above {gate.limit:.1e}")
    return None


def _gradient_gate(problem: Problem, grads: list[Tensor], upstream: Tensor) -> Gate:
    """Gradients at sampled tokens against the window's definition; a token has them from its own window alone."""
    tokens = problem.sampled_rows(16)
    reach = torch.arange(-problem.levels.radius, problem.levels.radius + 1)
    rows = (tokens[:, None] + reach).clamp(0, problem.tokens - 1).unique()

    def defined(dtype: torch.dtype) -> Tensor:
        # a copy: `to` gives the tensor itself where it has the type already
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (problem.query, problem.key, problem.value)]
        own = dataclasses.replace(problem, query=leaves[0], key=leaves[1], value=leaves[2])
        with torch.enable_grad():
            out = window_rows(own, rows, dtype)
            found = torch.autograd.grad((out * upstream[0][:, rows].to(dtype)).sum(), leaves)
        return torch.stack([x[0][:, tokens] for x in found])

    given = torch.stack([x[0][:, tokens] for x in grads])
    return check(given, defined(torch.float64), defined(torch.float32))


def scaling_row(
    contenders: list[Contender], short: Problem, long: Problem, *, budget_s: float, row: MakeRow
) -> list[Row]:
    """The native calibrated level at the long length, beside the short one in the same rounds."""
    contender = next((c for c in contenders if c.name == CALIBRATED and c.absence is None), None)
    if contender is None:
        return []
    with torch.no_grad():
        runs = {"short": contender.build(short), "long": contender.build(long)}
        timings = interleave(runs, budget_s=budget_s, warm_up=2)
    made = row(contender, "bfloat16", long.tokens)
    ratio = timings["long"].median_ms / timings["short"].median_ms
    made.update(timings["long"].to_dict(), status="measured", times_the_bars_length=ratio)
    return [made]


def native_bars(rows: list[Row]) -> list[Bar]:
    """The bars of issue 3, from rows of one run."""
    ms = {
        (row["precision"], row["tokens"], row["contender"]): row["median_ms"]
        for row in rows
        if row["status"] == "measured"
    }
    stock = {row["contender"] for row in rows if _is_stock(row)}

    def best_stock(precision: str) -> float | None:
        found = [ms[key] for key in ms if key[:2] == (precision, BAR_TOKENS) and key[2] in stock]
        return min(found, default=None)

    def over(value: float | None, precision: str, tokens: int, name: str) -> float | None:
        own = ms.get((precision, tokens, name))
        return None if value is None or own is None else value / own

    def against(other: str, precision: str, tokens: int, name: str) -> float | None:
        return over(ms.get((precision, tokens, other)), precision, tokens, name)

    copies = [against(LOCAL, precision, BAR_TOKENS, COPY) for precision in ("float32", "bfloat16")]
    grown = [row["times_the_bars_length"] for row in rows if "times_the_bars_length" in row]
    worst = None if None in copies else max(value for value in copies if value is not None)
    named: list[tuple[str, float | None, Any, float]] = [
        ("native_local_bf16_vs_stock", over(best_stock("bfloat16"), "bfloat16", BAR_TOKENS, LOCAL), ">=", 5),
        ("native_local_fp32_vs_stock", over(best_stock("float32"), "float32", BAR_TOKENS, LOCAL), ">=", 4.5),
        ("native_local_vs_copy", worst, "<=", 1.3),
        ("native_calibrated_bf16_vs_dense", against("dense SDPA", "bfloat16", BAR_TOKENS, CALIBRATED), ">=", 40),
        ("native_train_fp32_vs_stock", over(best_stock(TRAINING), TRAINING, BAR_TOKENS, LOCAL), ">=", 4),
        ("native_512_bf16_vs_dense", against("dense SDPA", "bfloat16", SHORT_TOKENS, CALIBRATED), ">=", 3),
        ("native_scaling_8k_to_64k", grown[0] if grown else None, "<=", 8.8),
        (
            "native_calibrated_vs_local",
            against(CALIBRATED, "bfloat16", BAR_TOKENS, LOCAL),
            "<=",
            2.5,
        ),
    ]
    return [Bar(name=name, value=value, op=op, bar=bar) for name, value, op, bar in named]


def _is_stock(row: Row) -> bool:
    """A local level put together from torch's operators: the peers' and our own portable one."""
    return bool(row["matches"] == "local" or row["contender"] == "trilevel local")
