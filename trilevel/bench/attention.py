"""`trilevel bench attention`: our attention beside dense attention and the sparse peers that run on a CPU."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trilevel.attention.levels import Levels
from trilevel.bench.contenders import Contender, all_peers, copy_floor, fusion, native_variants, own_variants
from trilevel.bench.harness import Bar, Gate, Progress, Report, Timing, check, interleave
from trilevel.bench.memory import peak_memory_bytes
from trilevel.bench.native import BAR_TOKENS, native_bars, scaling_row, training_rows
from trilevel.bench.problem import Problem
from trilevel.errors import TrilevelError

GIB = 2**30
MATCHING = {"local": "trilevel local", "calibrated": "trilevel calibrated"}


def _article_levels() -> Levels:
    return Levels(window=33, region_size=None, num_regions=128, num_global_tokens=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """What is measured.

    Args:
        training: also measure forward and backward of the local level at this length, in float32.
        scaling: also measure the native calibrated level in bfloat16 at this length, beside the bars' length.
        lengths: tokens, ascending, with the seconds of timing that all contenders of a length share.
        precisions: names of torch types.
        levels: of our calibrated variant; the others differ in ratio and mode alone.
        most_bytes, most_seconds: a contender predicted above either is skipped.
        without: names of contenders that are left out.
        memory: also measure peak memory at the longest length that the bars name, each in a process of its own.
    """

    lengths: Mapping[int, float] = field(default_factory=lambda: {512: 3.0, 2_048: 6.0, BAR_TOKENS: 24.0, 32_768: 8.0})
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    levels: Levels = field(default_factory=_article_levels)
    heads: int = 8
    dim: int = 64
    most_bytes: int = 8 * GIB
    most_seconds: float = 60.0
    without: frozenset[str] = frozenset()
    memory: bool = False
    training: int | None = BAR_TOKENS
    scaling: int | None = 65_536

    @staticmethod
    def smoke() -> AttentionCase:
        """The correctness gate of every contender and a glance at the clock, no bars."""
        return AttentionCase(
            lengths={256: 0.0},
            levels=Levels(window=17, region_size=None, num_regions=16, num_global_tokens=16),
            heads=8,
            dim=32,
            training=256,
            scaling=None,
        )


def run(case: AttentionCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Measure every contender at every length and precision; bars when the bars' length is among them."""
    contenders = [c for c in _all(case.levels) if c.name not in case.without]
    rows: list[dict[str, Any]] = []
    total = len(case.precisions) * len(case.lengths)
    done = 0
    for precision in case.precisions:
        seen: dict[str, tuple[int, float]] = {}
        for tokens in case.lengths:
            tell = functools.partial(_tell, progress, done / total)
            rows += _measure_length(case, contenders, precision, tokens, seen, tell)
            done += 1
    rows += extra_rows(case, contenders, functools.partial(_tell, progress, 1.0))
    if case.memory:
        _add_memory(case, rows, functools.partial(_tell, progress, 1.0))
    return Report(
        case="attention",
        rows=digest(rows),
        measurements=rows,
        bars=[*bars(rows), *native_bars(rows)] if BAR_TOKENS in case.lengths else [],
        settings=_settings(case),
        broken=sorted({row["contender"] for row in rows if row["status"] == "failed" and row["ours"]}),
    )


def _all(levels: Levels) -> list[Contender]:
    own = [*own_variants(levels).values(), *native_variants(levels).values(), *fusion(levels)]
    return [*own, copy_floor(), *all_peers()]


def digest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each precision and contender: milliseconds by length, ratios at the bars' length (else the last)."""
    made = []
    for precision, name in dict.fromkeys((row["precision"], row["contender"]) for row in rows):
        own = [row for row in rows if (row["precision"], row["contender"]) == (precision, name)]
        at = next((row for row in own if row["tokens"] == BAR_TOKENS), own[-1])
        made.append(
            {
                "precision": precision,
                "contender": name,
                **{f"ms_{row['tokens']}": row.get("median_ms") for row in own},
                "dense_over_this": at.get("dense_over_this"),
                "compared_with": MATCHING.get(at["matches"] or ""),
                "this_over_ours": at.get("this_over_ours"),
                "ratios_at": at["tokens"],
                "peak_memory_bytes": at.get("peak_memory_bytes"),
                "note": "; ".join(
                    f"{row['tokens']}: {row['status']}, {row['reason']}" for row in own if "reason" in row
                ),
            }
        )
    return made


def _tell(progress: Progress, done: float, what: str) -> None:
    progress(what, done)


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The bars of issue 2, all at 8,192 tokens."""
    ms = {
        (row["precision"], row["contender"]): row["median_ms"]
        for row in rows
        if row["tokens"] == BAR_TOKENS and row["status"] == "measured"
    }

    def ratio(precision: str, other: str, own: str) -> float | None:
        over, under = ms.get((precision, other)), ms.get((precision, own))
        return over / under if over is not None and under is not None else None

    against = [
        ratio(row["precision"], row["contender"], MATCHING[row["matches"]])
        for row in rows
        if row["tokens"] == BAR_TOKENS and row["status"] == "measured" and row["matches"]
    ]
    worst = None if not against or None in against else min(value for value in against if value is not None)
    calibrated = MATCHING["calibrated"]
    return [
        Bar(name="blocked_fp32_vs_dense", value=ratio("float32", "dense SDPA", calibrated), op=">=", bar=10),
        Bar(name="blocked_bf16_vs_dense", value=ratio("bfloat16", "dense SDPA", calibrated), op=">=", bar=8),
        Bar(name="blocked_vs_best_peer", value=worst, op=">=", bar=1),
    ]


def extra_rows(case: AttentionCase, contenders: list[Contender], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """What one length and precision does not show: training, and how the cost grows."""
    rows = []
    # the seconds that the bars' length has, for fewer contenders
    budget_s = case.lengths.get(BAR_TOKENS, 0.0)
    if case.training is not None:
        tell(f"float32 {case.training:,}: forward and backward")
        problem = Problem.draw(case.training, torch.float32, case.levels, heads=case.heads, dim=case.dim)
        rows += training_rows(contenders, problem, budget_s=budget_s, row=_row)
    if case.scaling is not None and BAR_TOKENS in case.lengths:
        tell(f"bfloat16 {case.scaling:,} beside {BAR_TOKENS:,}")
        problems = [
            Problem.draw(tokens, torch.bfloat16, case.levels, heads=case.heads, dim=case.dim)
            for tokens in (BAR_TOKENS, case.scaling)
        ]
        rows += scaling_row(contenders, *problems, budget_s=budget_s, row=_row)
    return rows


def _measure_length(
    case: AttentionCase,
    contenders: list[Contender],
    precision: str,
    tokens: int,
    seen: dict[str, tuple[int, float]],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of one length and precision; `seen` keeps (tokens, seconds) of each contender's last length."""
    problem = Problem.draw(tokens, getattr(torch, precision), case.levels, heads=case.heads, dim=case.dim)
    rows = [_row(contender, precision, tokens) for contender in contenders]
    runs: dict[str, Callable[[], object]] = {}
    # what other packages deprecate is not ours to report; leaving the block would make dynamo compile again
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        for row, contender in zip(rows, contenders, strict=True):
            tell(f"{precision} {tokens:,}: {contender.name}")
            call = _admit(case, contender, problem, row, seen.get(contender.name))
            if call is not None:
                runs[contender.name] = call
        tell(f"{precision} {tokens:,}: timing {len(runs)} contenders in turn")
        slow = max((row["first_s"] for row in rows if "first_s" in row), default=0.0) > case.most_seconds / 12
        # the gate was the warm-up
        timings = interleave(runs, budget_s=case.lengths[tokens], min_repeats=1 if slow else 3, warm_up=0)
    for row in rows:
        if row["contender"] in timings:
            _fill(row, timings)
            seen[row["contender"]] = (tokens, row["median_ms"] / 1e3)
    return rows


def _row(contender: Contender, precision: str, tokens: int) -> dict[str, Any]:
    return {
        "contender": contender.name,
        "ours": contender.name.startswith("trilevel"),
        "precision": precision,
        "tokens": tokens,
        "scope": contender.scope,
        "matches": contender.matches,
    }


def _admit(
    case: AttentionCase, contender: Contender, problem: Problem, row: dict[str, Any], last: tuple[int, float] | None
) -> Callable[[], Tensor] | None:
    """Build a contender and take it through the gate; None, with the reason in `row`, when it is not to be timed."""
    reason = _reason_to_skip(case, contender, problem, last)
    if reason is not None:
        row.update(status=reason[0], reason=reason[1])
        return None
    try:
        call = contender.build(problem)
        output, row["first_s"] = _warm_up(call)
    except (RuntimeError, ValueError, TypeError, ImportError, TrilevelError) as error:
        row.update(status="failed", reason=f"raised {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return None
    if contender.rows is None:
        row["status"] = "measured"
        return call
    gate = gate_of(contender, problem, output)
    row.update(error=gate.error, limit=gate.limit, status="measured")
    if gate.passed:
        return call
    row.update(status="failed", reason=f"error {gate.error:.1e} above the {gate.limit:.1e} its precision allows")
    return None


def _warm_up(call: Callable[[], Tensor], enough_s: float = 3.0) -> tuple[Tensor, float]:
    """Output of a contender and the seconds of one call; a first call that takes long is not made twice."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        output = call()
        seconds = time.perf_counter() - start
        if seconds > enough_s:
            break
    return output, seconds


def _reason_to_skip(
    case: AttentionCase, contender: Contender, problem: Problem, last: tuple[int, float] | None
) -> tuple[str, str] | None:
    if contender.absence is not None:
        return "absent", contender.absence
    predicted = contender.peak_bytes(problem.tokens, problem.heads, case.dim, problem.query.element_size())
    if predicted > case.most_bytes:
        return "skipped", f"predicted {predicted / GIB:.1f} GiB, limit {case.most_bytes / GIB:.0f} GiB"
    seconds = 0.0 if last is None else last[1] * (problem.tokens / last[0]) ** 2
    if seconds > case.most_seconds and not contender.name.startswith("trilevel"):
        return "skipped", f"predicted {seconds:.0f} s, limit {case.most_seconds:.0f} s"
    return None


def gate_of(contender: Contender, problem: Problem, output: Tensor) -> Gate:
    """Check an output at sampled queries against the contender's definition in float64."""
    assert contender.rows is not None
    rows = problem.sampled_rows()
    exact = contender.rows(problem, rows, torch.float64)
    rounded = contender.rows(problem, rows, output.dtype)
    if output.shape != problem.query.shape:
        return check(output, exact, rounded)
    return check(output[0][:, rows], exact, rounded)


def _fill(row: dict[str, Any], timings: Mapping[str, Timing]) -> None:
    row.update(timings[row["contender"]].to_dict())
    if "dense SDPA" in timings:
        row["dense_over_this"] = timings["dense SDPA"].median_ms / row["median_ms"]
    own = MATCHING.get(row["matches"] or "", "")
    if own in timings:
        row["compared_with"] = own
        row["this_over_ours"] = row["median_ms"] / timings[own].median_ms


def _add_memory(case: AttentionCase, rows: list[dict[str, Any]], tell: Callable[[str], None]) -> None:
    tokens = BAR_TOKENS if BAR_TOKENS in case.lengths else max(case.lengths)
    for row in rows:
        if row["tokens"] == tokens and row["status"] == "measured" and row["precision"] == "float32":
            tell(f"memory at {tokens:,}: {row['contender']}")
            row["peak_memory_bytes"] = peak_memory_bytes(
                "trilevel.bench.attention:call_by_name", row["contender"], tokens
            )


def call_by_name(name: str, tokens: int) -> Callable[[], Tensor]:
    """A contender's call in float32 with the default case's levels, for a process that measures memory."""
    case = AttentionCase()
    contender = next(c for c in _all(case.levels) if c.name == name)
    torch.set_grad_enabled(False)
    return contender.build(Problem.draw(tokens, torch.float32, case.levels, heads=case.heads, dim=case.dim))


def _settings(case: AttentionCase) -> dict[str, Any]:
    levels = case.levels
    return {
        "heads": case.heads,
        "dim": case.dim,
        "ratio": list(levels.ratio.shares),
        "window": levels.window,
        "num_regions": levels.num_regions,
        "num_global_tokens": levels.num_global_tokens,
        "threads": torch.get_num_threads(),
        "versions": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("torch", "transformers", "local-attention", "native-sparse-attention-pytorch"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "absent"
