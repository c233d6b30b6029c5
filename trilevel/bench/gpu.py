"""`trilevel bench gpu`: our Triton kernels beside the windowed peers of NVIDIA GPUs, and the floor that memory sets.

Each call is captured as a CUDA graph where it can be, so the host's share is in no number, and timed by CUDA events,
contenders in turn. Without a GPU only the smoke case runs, in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.bench.attention import gate_of
from trilevel.bench.contenders import Contender, dense, window_block_mask
from trilevel.bench.harness import Bar, Progress, Report, Timing
from trilevel.bench.problem import Problem, levels_rows, window_rows
from trilevel.errors import InputError, TrilevelError

CORE = "attention core: q, k, v (1, heads, tokens, dim)"
COPY = "copy of q, k, v, o"
LOCAL, CALIBRATED = "trilevel local", "trilevel calibrated"
NSA_BLOCK = 64
# the smallest group of query heads that its kernels take
NSA_GROUP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCase:
    """What is measured; `rounds` of `calls` each, none in the smoke case."""

    tokens: int = 16_384
    heads: int = 8
    dim: int = 64
    precision: str = "bfloat16"
    levels: Levels = field(default_factory=lambda: Levels(window=33, region_size=None, num_regions=128))
    rounds: int = 30
    calls: int = 20

    @staticmethod
    def smoke() -> GpuCase:
        """The correctness gate of our own, small enough for the interpreter."""
        levels = Levels(window=7, region_size=None, num_regions=5, num_global_tokens=6)
        return GpuCase(tokens=67, heads=4, dim=16, levels=levels, rounds=0)


def run(case: GpuCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Check every contender, then time those that passed.

    Raises:
        InputError: there is no GPU and the case is not the smoke case.
    """
    has_gpu = torch.cuda.is_available()
    if case.rounds and not has_gpu:
        raise InputError(
            "trilevel bench gpu needs an NVIDIA GPU and a torch built for CUDA, and torch sees none "
            f"(torch {torch.__version__}). Run it on such a machine, or add --smoke to check the kernels in the "
            "interpreter."
        )
    problem = Problem.draw(case.tokens, getattr(torch, case.precision), case.levels, heads=case.heads, dim=case.dim)
    device = "cuda" if has_gpu else "cpu"
    contenders = [*own(case.levels), *(peers() if case.rounds else [])]
    rows, calls = [], {}
    with torch.no_grad():
        for place, contender in enumerate(contenders):
            progress(f"checking {contender.name}", place / (len(contenders) + 1))
            row, call = _admit(case, contender, problem, device)
            rows.append(row)
            if call is not None:
                calls[contender.name] = call
        if case.rounds:
            progress(f"timing {len(calls)} contenders in turn", len(contenders) / (len(contenders) + 1))
            rows.append(_copy_row(case))
            timings = time_in_turn({**calls, COPY: _copy(problem.query.to(device))}, case)
            _fill(rows, timings)
    return Report(
        case="gpu",
        rows=rows,
        measurements=rows,
        bars=bars(rows) if case.rounds else [],
        settings={**dataclasses.asdict(case), "device": device},
        broken=sorted(row["contender"] for row in rows if row["ours"] and row["status"] == "failed"),
    )


def own(levels: Levels) -> list[Contender]:
    """Ours: the window alone (what peers do), the local level with its remainder, and the calibrated levels."""
    only_local = LevelRatio(1, 0, 0)
    return [
        _ours(LOCAL, dataclasses.replace(levels, ratio=only_local, mode="strict")),
        _ours("trilevel local + remainder", dataclasses.replace(levels, ratio=only_local)),
        _ours(CALIBRATED, levels),
    ]


def peers() -> list[Contender]:
    """Dense SDPA, compiled FlexAttention, windowed FlashAttention, NSA of flash-linear-attention."""
    return [dense(), _flex(), _flash(), _nsa()]


def _ours(name: str, levels: Levels) -> Contender:
    def build(problem: Problem) -> Callable[[], Tensor]:
        wants_score = levels.ratio.split(problem.heads).global_ > 0
        score = problem.global_score if wants_score else None
        return functools.partial(
            multi_level_attention, problem.query, problem.key, problem.value, levels=levels, global_score=score,
            impl="triton",
        )  # fmt: skip

    return _contender(name, build, lambda problem, rows, dtype: levels_rows(problem, rows, dtype, levels))


def _contender(name: str, build: Any, rows: Any, **more: Any) -> Contender:
    return Contender(name=name, build=build, rows=rows, peak_bytes=lambda *_: 0, **{"scope": CORE, **more})


def _flex() -> Contender:
    def build(p: Problem) -> Callable[[], Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        # 128 is the block that its GPU kernels are tuned for
        mask = window_block_mask(p.tokens, p.levels.radius, block=128).to(p.query.device)
        return lambda: compiled(p.query, p.key, p.value, block_mask=mask)

    return _contender(
        "FlexAttention", build, window_rows, matches="local", scope=f"{CORE}, compiled; block mask beforehand"
    )


def _flash() -> Contender:
    def build(p: Problem) -> Callable[[], Tensor]:
        import importlib

        attend = importlib.import_module("flash_attn").flash_attn_func
        # its own layout, made beforehand: tokens before heads
        q, k, v = (x.transpose(1, 2).contiguous() for x in (p.query, p.key, p.value))
        window = (p.levels.radius, p.levels.radius)
        return lambda: attend(q, k, v, softmax_scale=p.scale, window_size=window).transpose(1, 2)

    return _contender(
        "FlashAttention, window", build, window_rows, matches="local", package="flash_attn",
        scope="attention core: q, k, v (1, tokens, heads, dim)",
    )  # fmt: skip


def _nsa() -> Contender:
    """The selected branch alone on two blocks a query, its own and the one before: the least that NSA computes."""

    def build(p: Problem) -> Callable[[], Tensor]:
        import importlib

        attend = importlib.import_module("fla.ops.nsa.parallel").parallel_nsa
        q = p.query[:, :1].expand(-1, NSA_GROUP, -1, -1).transpose(1, 2).contiguous()
        k, v = (x[:, :1].transpose(1, 2).contiguous() for x in (p.key, p.value))
        own_block = torch.arange(p.tokens, device=q.device) // NSA_BLOCK
        # -1 is no block
        chosen = torch.stack([own_block, own_block - 1], -1)[None, :, None]
        gate = q.new_ones(q.shape[:3])
        more = {"g_slc": gate, "block_indices": chosen, "block_counts": 2, "block_size": NSA_BLOCK, "scale": p.scale}
        return lambda: attend(q, k, v, **more).transpose(1, 2)

    return _contender(
        "flash-linear-attention NSA", build, nsa_rows, package="fla",
        scope=f"selected branch, causal, {NSA_GROUP} equal query heads over 1 KV head, the smallest group it takes",
    )  # fmt: skip


def nsa_rows(problem: Problem, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention to the query's own block and the one before, (NSA_GROUP, rows, dim)."""
    q, k, v = (x[:1] for x in problem.as_dtype(dtype))
    at = torch.arange(problem.tokens)
    behind = rows[:, None] // NSA_BLOCK - at // NSA_BLOCK
    seen = (at <= rows[:, None]) & (behind <= 1)
    logits = (q[:, rows] @ k.transpose(-1, -2) * problem.scale).masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).expand(NSA_GROUP, -1, -1)


def _admit(
    case: GpuCase, contender: Contender, problem: Problem, device: str
) -> tuple[dict[str, Any], Callable[[], Tensor] | None]:
    """A row that says how the gate went, and the call where it passed."""
    row: dict[str, Any] = {**_row(case, contender.name, contender.scope), "matches": contender.matches}
    if contender.absence is not None:
        row.update(status="absent", reason=contender.absence)
        return row, None
    moved = {name: getattr(problem, name).to(device) for name in ("query", "key", "value", "global_score")}
    try:
        call = contender.build(dataclasses.replace(problem, **moved))
        output = call().cpu()
    except (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError, TrilevelError) as error:
        if row["ours"] and isinstance(error, TrilevelError):
            raise
        row.update(status="failed", reason=f"raised {type(error).__name__}: {str(error)[:160]}")
        return row, None
    rows = problem.sampled_rows()
    # a peer with other heads than the problem's is compared at its own
    gate = gate_of(contender, problem, output if output.shape == problem.query.shape else output[0][:, rows])
    row.update(error=gate.error, limit=gate.limit, status="measured")
    if gate.passed:
        return row, call
    row.update(status="failed", reason=f"error {gate.error:.1e} above the {gate.limit:.1e} its precision allows")
    return row, None


def _row(case: GpuCase, name: str, scope: str) -> dict[str, Any]:
    return {
        "contender": name,
        "ours": name.startswith("trilevel"),
        "precision": case.precision,
        "tokens": case.tokens,
        "scope": scope,
        "matches": None,
    }


def _copy_row(case: GpuCase) -> dict[str, Any]:
    return {**_row(case, COPY, "four tensors read and four written"), "status": "measured"}


def _copy(like: Tensor) -> Callable[[], Tensor]:
    source = torch.zeros(4, *like.shape, dtype=like.dtype, device=like.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def time_in_turn(calls: dict[str, Callable[[], Tensor]], case: GpuCase) -> dict[str, Timing]:
    """Seconds of one call in each round, measured by CUDA events around `case.calls` of them."""
    runs = {name: _captured(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(case.rounds + 1):
        for name, run_once in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(case.calls):
                run_once()
            end.record()
            end.synchronize()
            # the first round warms up
            if number:
                seconds[name].append(start.elapsed_time(end) / 1e3 / case.calls)
    return {name: Timing(seconds=tuple(spent)) for name, spent in seconds.items()}


def _captured(call: Callable[[], Tensor]) -> Callable[[], object]:
    """The call as a CUDA graph, or itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def _fill(rows: list[dict[str, Any]], timings: dict[str, Timing]) -> None:
    for row in rows:
        if row["contender"] in timings:
            timing = timings[row["contender"]]
            row.update(timing.to_dict())
            if "dense SDPA" in timings:
                row["dense_over_this"] = timings["dense SDPA"].median_ms / timing.median_ms
            if row["matches"] == "local" and LOCAL in timings:
                row["compared_with"] = LOCAL
                row["this_over_ours"] = timing.median_ms / timings[LOCAL].median_ms


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The bars of issue 3 for a GPU: share of the copy's bandwidth, and the best windowed peer over ours."""
    ms = {row["contender"]: row["median_ms"] for row in rows if row.get("median_ms") and row["status"] == "measured"}
    windowed = [ms[row["contender"]] for row in rows if row["matches"] == "local" and row["contender"] in ms]
    local = ms.get(LOCAL)
    # attention reads three tensors and writes one, half of what the copy moves
    share = None if local is None or COPY not in ms else ms[COPY] / 2 / local
    return [
        Bar(name="triton_local_vs_copy_bandwidth", value=share, op=">=", bar=0.6),
        Bar(
            name="triton_local_vs_best_peer",
            value=min(windowed) / local if local is not None and windowed else None,
            op=">=",
            bar=2,
        ),
    ]
