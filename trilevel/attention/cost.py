"""What attention costs: floating point operations, bytes and predicted milliseconds, from sizes alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple, get_args

import torch

from trilevel.attention import calibration, shipped
from trilevel.attention.calibration import FRESH_BYTES, Calibration, Work
from trilevel.attention.impl.blocked import STEP_LOGITS
from trilevel.attention.levels import HeadSplit, LevelRatio, Levels
from trilevel.errors import ConfigError

CostImpl = Literal["blocked", "materialised"]
PredictedImpl = Literal["native", "blocked", "dense"]
# how often operators read or write a score. Materialised dense attention: product, softmax, product. Levels: also bias,
# concatenation, layout, and the remainder's share in and out; counted in a profile of `blocked`
MATERIALISED_PASSES, BLOCKED_PASSES = 4, 16
# a block of queries computes about two windows and copies its keys and values: read and written twice
WINDOWS_PER_BLOCK, WINDOW_PASSES = 2, 8
# causal: finite checks and cleaning of the inputs, running sums and their shift by a window
CLEANING_PASSES, RUNNING_SUM_PASSES = 4, 8
# `blocked` must be predicted this much faster before it runs in place of `native`: both predictions may be a fifth off
CLEARLY = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates that a prediction divides by: operations a second of a large matrix product, bytes a second of a copy."""

    flops_per_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        """Check the rates."""
        if not (self.flops_per_s > 0 and self.bytes_per_s > 0):
            raise ConfigError(f"{self}: both rates must be > 0. Use measure_machine().")


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a forward pass; costs of consecutive passes add up with `+`.

    flops: a product and a sum count as two; exp and sorting are not counted. bytes_moved: to and from memory.
    peak_bytes: estimated, allocated at once beyond inputs and parameters, the output included.
    """

    flops: int
    bytes_moved: int
    peak_bytes: int

    def predicted_ms(self, machine: Machine) -> float:
        """Milliseconds: flops and bytes one after the other, as torch runs operators without overlap."""
        return 1e3 * (self.flops / machine.flops_per_s + self.bytes_moved / machine.bytes_per_s)

    def __add__(self, other: Cost) -> Cost:
        """One after the other: work adds up, the peak is the higher one."""
        return Cost(
            self.flops + other.flops, self.bytes_moved + other.bytes_moved, max(self.peak_bytes, other.peak_bytes)
        )


class EntryCounts(NamedTuple):
    """(query, entry) pairs that one head of each class computes in one row."""

    local: int
    regional: int
    global_: int


def entry_counts(levels: Levels | None, *, tokens: int, is_causal: bool = False) -> EntryCounts:
    """Pairs a head computes in a row of `tokens` tokens.

    With near = min(window, tokens) (causal: min(w + 1, tokens)), m regions and p = min(num_global_tokens, tokens), a
    query of a `calibrated` head has

    - local: near + num_sinks + 1 (the remainder);
    - regional: near + m, causal + 1;
    - global: near + p + 1; with `union` near + p + m, causal + 1.

    `strict` heads compute tokens * near, m * m and p * p pairs. Dense attention (`levels=None`, `dense_below`, or a
    window that covers everything) computes tokens * tokens pairs, causal tokens * (tokens + 1) / 2. Edges of the row
    and entries that are masked count like any other.

    >>> entry_counts(Levels(num_global_tokens=64), tokens=8192)
    EntryCounts(local=278528, regional=1318912, global_=802816)
    """
    _check_sizes(tokens=tokens)
    if levels is None or _is_dense(levels, tokens):
        return EntryCounts(*3 * [tokens * (tokens + 1) // 2 if is_causal else tokens * tokens])
    near = _near(levels, tokens, is_causal)
    regions, chosen = _num_regions(levels, tokens), min(levels.num_global_tokens, tokens)
    if levels.mode == "strict":
        return EntryCounts(tokens * near, regions * regions, chosen * chosen)
    sinks, open_region = min(levels.num_sinks, tokens), int(is_causal)
    beyond = regions + open_region if levels.union else 1
    return EntryCounts(
        tokens * (near + sinks + 1), tokens * (near + regions + open_region), tokens * (near + chosen + beyond)
    )


def attention_cost(
    levels: Levels | None,
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    tokens: int,
    head_dim: int,
    bytes_per_value: int = 4,
    is_causal: bool = False,
    impl: CostImpl = "blocked",
) -> Cost:
    """Cost of one forward call without gradients, projections not included.

    - flops: 4 * head_dim a (query, entry) pair of `entry_counts`, for q . key and weight * value; 4 * head_dim a token
      and KV head whose keys and values are summed for the remainder; 6 * head_dim a token and KV head that is pooled
      into regions (u . k, keys, values), `strict` 2 * head_dim more a query head.
    - bytes_moved: queries, keys, values and outputs once. `materialised` and levels: every score as often as operators
      read or write it (the constants of this module); fused dense attention keeps scores in registers. Levels: copies
      of windows; causal: running sums, and the global tokens that every query gathers for itself.
    - peak_bytes: the output; levels: the outputs of the head classes beside it, the scores of a streamed step, and
      causal the cleaned inputs and running sums; `materialised`: two matrices of tokens x tokens a head.

    Scores and sums take 4 bytes at least. All but dense attention is linear in tokens at fixed m and p; `region_size`
    makes m grow with tokens.

    Args:
        levels: the levels, None for dense attention.
        batch: rows.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        tokens: tokens in a row.
        head_dim: features of a head.
        bytes_per_value: of queries, keys and values (4 for float32, 2 for bfloat16).
        is_causal: a token sees the past and itself.
        impl: `blocked` keeps scores in blocks (this package's, or SDPA where attention is dense); `materialised`
            keeps all tokens * tokens scores, for `levels=None` only.

    Raises:
        ConfigError: a size is not positive, the heads do not divide, or `impl` is unknown or not of these levels.
    """
    _check_sizes(batch=batch, tokens=tokens, head_dim=head_dim, bytes_per_value=bytes_per_value)
    if impl not in ("blocked", "materialised"):
        raise ConfigError(f"impl={impl!r} is unknown; use 'blocked' or 'materialised'.")
    if impl == "materialised" and levels is not None:
        raise ConfigError("impl='materialised' is dense attention with all its scores; it needs levels=None.")
    split = (LevelRatio(1, 0, 0) if levels is None else levels.ratio).split(num_heads, num_kv_heads)
    sizes = _Sizes(
        vectors=batch * tokens * head_dim,
        tokens=tokens,
        head_dim=head_dim,
        split=split,
        groups=HeadSplit(*(heads * num_kv_heads // num_heads for heads in split)),
        size=bytes_per_value,
        is_causal=is_causal,
    )
    if levels is None or _is_dense(levels, tokens):
        return _dense_cost(sizes, impl)
    return _levels_cost(levels, sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Sizes of a call: vectors is batch * tokens * head_dim; split counts query heads, groups KV heads."""

    vectors: int
    tokens: int
    head_dim: int
    split: HeadSplit
    groups: HeadSplit
    size: int
    is_causal: bool

    @property
    def wide(self) -> int:
        """Bytes of a score or sum."""
        return max(self.size, 4)

    @property
    def output(self) -> int:
        """Bytes of the output."""
        return self.vectors * sum(self.split) * self.size

    @property
    def inputs(self) -> int:
        """Bytes of queries, keys and values."""
        return self.vectors * (sum(self.split) + 2 * sum(self.groups)) * self.size


def _dense_cost(sizes: _Sizes, impl: CostImpl) -> Cost:
    half = sizes.is_causal and impl == "blocked"
    pairs = entry_counts(None, tokens=sizes.tokens, is_causal=half).local
    # vectors / tokens is batch * head_dim
    features = sizes.vectors // sizes.tokens * sum(sizes.split)
    scores = features // sizes.head_dim * pairs * sizes.size if impl == "materialised" else 0
    moved = sizes.inputs + sizes.output + MATERIALISED_PASSES * scores
    return Cost(4 * features * pairs, moved, sizes.output + 2 * scores)


def _levels_cost(levels: Levels, sizes: _Sizes) -> Cost:
    wide, vectors, tokens = sizes.wide, sizes.vectors, sizes.tokens
    rows = vectors // (tokens * sizes.head_dim)
    counts = entry_counts(levels, tokens=tokens, is_causal=sizes.is_causal)
    pairs = rows * sum(heads * count for heads, count in zip(sizes.split, counts, strict=True))
    near = rows * tokens * _near(levels, tokens, sizes.is_causal) * _windowed(levels, sizes.split)
    scores = pairs + (WINDOWS_PER_BLOCK - 1) * near
    moved = sizes.inputs + sizes.output + BLOCKED_PASSES * wide * scores
    moved += WINDOW_PASSES * wide * vectors * _windowed(levels, sizes.groups)
    # class outputs beside the whole; of a step's scores about four tensors live at once
    peak = 2 * sizes.output + 4 * wide * min(scores, STEP_LOGITS)
    if sizes.is_causal:
        sums = 2 * vectors * wide
        moved += CLEANING_PASSES * sizes.inputs + RUNNING_SUM_PASSES * sums * sum(sizes.groups)
        # every query reads global tokens of its own: gathered, keys and values, written and read
        moved += 4 * wide * vectors * sizes.groups.global_ * min(levels.num_global_tokens, tokens)
        peak += sizes.inputs + 2 * sums * max(sizes.groups)
    return Cost(4 * sizes.head_dim * pairs + vectors * _per_token(levels, sizes), moved, peak)


def _near(levels: Levels, tokens: int, is_causal: bool) -> int:
    """Keys in a near window."""
    return min(levels.radius + 1 if is_causal else levels.window, tokens)


def _windowed(levels: Levels, heads: HeadSplit) -> int:
    """Heads with a near window."""
    return heads.local if levels.mode == "strict" else sum(heads)


def _per_token(levels: Levels, sizes: _Sizes) -> int:
    """Operations a token and feature outside the pairs: sums of the remainder and pooling."""
    groups = sizes.groups
    if levels.mode == "strict":
        # u . k, and the sums of keys, values and queries
        return 6 * groups.regional + 2 * sizes.split.regional
    summed, pooled = groups.local + groups.global_, groups.regional
    if levels.union:
        summed, pooled = groups.local, groups.regional + groups.global_
    # the remainder of causal pooled heads is the open region
    return 4 * (summed + pooled * sizes.is_causal) + 6 * pooled


def _is_dense(levels: Levels, tokens: int) -> bool:
    below = levels.dense_below is not None and tokens < levels.dense_below
    return below or (levels.mode == "calibrated" and levels.radius >= tokens - 1)


def _num_regions(levels: Levels, tokens: int) -> int:
    if levels.region_size is not None:
        return -(-tokens // levels.region_size)
    assert levels.num_regions is not None
    return levels.num_regions


def predicted_ms(
    levels: Levels | None,
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool = False,
    impl: PredictedImpl = "native",
) -> float:
    """Milliseconds of one forward call on a CPU, projections not included.

    The nanoseconds for each kind of `work` come from this machine's calibration (`trilevel bench calibrate`), for the
    threads that torch has now; without one from `shipped.py`, measured on the machine that it names.

    Args:
        levels: the levels; None is dense attention (`impl="dense"`).
        batch, num_heads, num_kv_heads, tokens, head_dim, is_causal: as in `attention_cost`.
        dtype: float32 or bfloat16.
        impl: `native`, `blocked`, or `dense` (torch's own).

    Raises:
        ConfigError: sizes as in `attention_cost`; an `impl` that is unknown or not of these levels; a type without
            rates.
    """
    amounts = work(
        levels, batch=batch, num_heads=num_heads, num_kv_heads=num_kv_heads, tokens=tokens, head_dim=head_dim,
        dtype=dtype, is_causal=is_causal, impl=impl,
    )  # fmt: skip
    key = (impl, str(dtype).removeprefix("torch."))
    for known in (calibration.current(), shipped.CALIBRATION):
        found = None if known is None else known.predicted_ms(key, amounts)
        if found is not None:
            return found
    raise ConfigError(f"dtype={dtype} has no measured rates; use torch.float32 or torch.bfloat16.")


def work(
    levels: Levels | None,
    *,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool = False,
    impl: PredictedImpl = "native",
) -> Work:
    """What a forward call does, in the kinds that predictions are made of; arguments as in `predicted_ms`."""
    _check_sizes(batch=batch, tokens=tokens, head_dim=head_dim)
    if impl not in get_args(PredictedImpl):
        raise ConfigError(f"impl={impl!r} is unknown; use one of {', '.join(get_args(PredictedImpl))}.")
    if (levels is None) != (impl == "dense"):
        raise ConfigError(f"impl={impl!r} does not go with levels={levels}; 'dense' is the one of levels=None.")
    split = (LevelRatio(1, 0, 0) if levels is None else levels.ratio).split(num_heads, num_kv_heads)
    counts = entry_counts(levels, tokens=tokens, is_causal=is_causal)
    pairs = batch * sum(heads * count for heads, count in zip(split, counts, strict=True))
    size, rows = dtype.itemsize, batch * tokens
    output = rows * num_heads * head_dim * size
    near, classes, in_turn, folded, small = pairs, 0, 0, 0, 0
    if levels is not None and not _is_dense(levels, tokens):
        near = rows * _near(levels, tokens, is_causal) * _windowed(levels, split)
        small = split.regional + split.global_ if levels.mode == "strict" else 0
        folded = rows * head_dim * (sum(split) if levels.mode == "calibrated" else 0)
        by_torch = split if impl == "blocked" else split[1:] if small else ()
        classes = sum(heads > 0 for heads in by_torch)
        if impl == "blocked" and levels.mode == "strict":
            in_turn = batch * split.local * num_kv_heads // num_heads
    return Work(
        calls=1,
        classes=classes,
        heads=in_turn,
        bytes_=2 * output + 2 * rows * num_kv_heads * head_dim * size,
        fresh=output if output >= FRESH_BYTES else 0,
        near=near,
        tail=pairs - near,
        products=head_dim * pairs,
        folded=folded,
        pooled=rows * head_dim * small * size,
    )


def cheaper(
    levels: Levels, shape: tuple[int, ...], num_kv_heads: int, dtype: torch.dtype, is_causal: bool
) -> Literal["native", "blocked"]:
    """`blocked` where this machine's calibration predicts it to be clearly faster, else `native`.

    Takes microseconds from the second call of a shape on.

    Args:
        levels: the levels.
        shape: of the queries, (batch, heads, tokens, dim).
        num_kv_heads: key and value heads.
        dtype: of the queries.
        is_causal: as in `attention_cost`.
    """
    known = calibration.current()
    return "native" if known is None else cheaper_by(known, levels, shape, num_kv_heads, dtype, is_causal)


@lru_cache(maxsize=4096)
def cheaper_by(
    known: Calibration, levels: Levels, shape: tuple[int, ...], num_kv_heads: int, dtype: torch.dtype, is_causal: bool
) -> Literal["native", "blocked"]:
    """`cheaper` by a given calibration."""
    batch, heads, tokens, dim = shape
    found: dict[str, float] = {}
    impls: tuple[PredictedImpl, ...] = ("native", "blocked")
    for impl in impls:
        amounts = work(
            levels, batch=batch, num_heads=heads, num_kv_heads=num_kv_heads, tokens=tokens, head_dim=dim, dtype=dtype,
            is_causal=is_causal, impl=impl,
        )  # fmt: skip
        found[impl] = known.predicted_ms((impl, str(dtype).removeprefix("torch.")), amounts) or float("inf")
    return "blocked" if CLEARLY * found["blocked"] < found["native"] else "native"


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"a cost needs {name} >= 1, got {size}.")


def measure_machine() -> Machine:
    """Rates of this CPU with the threads torch has now: a 1024 x 1024 float32 product and a copy of 64 MiB.

    Takes about a tenth of a second once per process and number of threads.
    """
    return _measured(torch.get_num_threads())


@cache
def _measured(_threads: int) -> Machine:
    size = 1024
    left, right = torch.ones(size, size), torch.ones(size, size)
    source = torch.ones(16 * 2**20)
    target = torch.zeros_like(source)
    with torch.no_grad():
        product_s = _best_s(lambda: torch.mm(left, right))
        copy_s = _best_s(lambda: target.copy_(source))
    return Machine(flops_per_s=2 * size**3 / product_s, bytes_per_s=2 * source.nbytes / copy_s)


def _best_s(call: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
