"""The cost model: exact counts for small sizes, how costs grow, and predictions against the clock."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilevel.attention import calibration, shipped
from trilevel.attention.api import multi_level_attention
from trilevel.attention.calibration import FRESH_BYTES, Work
from trilevel.attention.cost import (
    Cost,
    CostImpl,
    EntryCounts,
    Machine,
    PredictedImpl,
    attention_cost,
    entry_counts,
    measure_machine,
    predicted_ms,
    work,
)
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError

SMALL = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=4, num_global_tokens=3)
STRICT = replace(SMALL, mode="strict")
FIXED = replace(SMALL, region_size=None, num_regions=7)


def amounts(levels: Levels | None, impl: PredictedImpl, **changes: Any) -> Work:
    sizes: dict[str, Any] = {"batch": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 7, "dtype": torch.float32}
    return work(levels, impl=impl, **({"tokens": 19} | sizes | changes))


def cost(levels: Levels | None, *, tokens: int = 19, impl: CostImpl = "blocked", **changes: Any) -> Cost:
    sizes: dict[str, Any] = {"batch": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 7}
    return attention_cost(levels, tokens=tokens, impl=impl, **(sizes | changes))


# definition


@pytest.mark.parametrize(
    ("levels", "is_causal", "wanted"),
    [
        # 19 tokens, 5 regions of 4, the last with 3
        (SMALL, False, (19 * (5 + 1), 19 * (5 + 5), 19 * (5 + 3 + 1))),
        (SMALL, True, (19 * (3 + 1), 19 * (3 + 5 + 1), 19 * (3 + 3 + 1))),
        (replace(SMALL, num_sinks=2), False, (19 * (5 + 2 + 1), 19 * (5 + 5), 19 * (5 + 3 + 1))),
        (replace(SMALL, union=True), False, (19 * (5 + 1), 19 * (5 + 5), 19 * (5 + 3 + 5))),
        (replace(SMALL, union=True), True, (19 * (3 + 1), 19 * (3 + 5 + 1), 19 * (3 + 3 + 5 + 1))),
        (FIXED, False, (19 * (5 + 1), 19 * (5 + 7), 19 * (5 + 3 + 1))),
        (replace(SMALL, num_global_tokens=97, num_sinks=97), False, (19 * (5 + 19 + 1), 19 * 10, 19 * (5 + 19 + 1))),
        # the article's O(nk), O(m^2), O(p^2)
        (STRICT, False, (19 * 5, 5 * 5, 3 * 3)),
        (None, False, (19 * 19,) * 3),
        (None, True, (19 * 20 // 2,) * 3),
        (replace(SMALL, dense_below=20), False, (19 * 19,) * 3),
        (replace(SMALL, dense_below=19), False, (19 * (5 + 1), 19 * (5 + 5), 19 * (5 + 3 + 1))),
        (replace(SMALL, window=37), False, (19 * 19,) * 3),
        (replace(SMALL, window=35), False, (19 * (19 + 1), 19 * (19 + 5), 19 * (19 + 3 + 1))),
        (replace(STRICT, window=37), False, (19 * 19, 5 * 5, 3 * 3)),
    ],
)
def test_pairs_of_each_class(levels: Levels | None, is_causal: bool, wanted: tuple[int, int, int]) -> None:
    assert entry_counts(levels, tokens=19, is_causal=is_causal) == EntryCounts(*wanted)


def test_flops_of_every_mode() -> None:
    # two rows, two heads of each class and one KV head of each, 7 features
    rows, dim, tokens = 2, 7, 19
    summed, pooled = 4 * dim * tokens * rows, 6 * dim * tokens * rows
    pairs = entry_counts(SMALL, tokens=tokens)
    assert cost(SMALL).flops == rows * 2 * sum(pairs) * 4 * dim + 2 * summed + pooled
    pairs = entry_counts(SMALL, tokens=tokens, is_causal=True)
    assert cost(SMALL, is_causal=True).flops == rows * 2 * sum(pairs) * 4 * dim + 3 * summed + pooled
    union = replace(SMALL, union=True)
    pairs = entry_counts(union, tokens=tokens)
    assert cost(union).flops == rows * 2 * sum(pairs) * 4 * dim + summed + 2 * pooled
    pairs = entry_counts(STRICT, tokens=tokens)
    pooled_queries = 2 * dim * tokens * rows * 2
    assert cost(STRICT).flops == rows * 2 * sum(pairs) * 4 * dim + pooled + pooled_queries
    assert cost(None).flops == rows * 6 * tokens * tokens * 4 * dim
    assert cost(None, is_causal=True).flops == rows * 6 * (tokens * (tokens + 1) // 2) * 4 * dim


def test_bytes_of_dense_attention() -> None:
    vectors, scores = 2 * 19 * 7 * 4, 2 * 6 * 19 * 19 * 4
    # six query heads, three key, three value heads, six outputs
    assert cost(None) == Cost(2 * 6 * 19 * 19 * 28, 18 * vectors, 6 * vectors)
    assert cost(None, impl="materialised") == Cost(
        2 * 6 * 19 * 19 * 28, 18 * vectors + 4 * scores, 6 * vectors + 2 * scores
    )
    # a materialised causal matrix is computed whole
    assert cost(None, impl="materialised", is_causal=True) == cost(None, impl="materialised")
    half = cost(None, impl="materialised", bytes_per_value=2)
    assert (half.bytes_moved * 2, half.peak_bytes * 2) == (18 * vectors + 4 * scores, 6 * vectors + 2 * scores)


def test_prediction_divides_by_the_rates() -> None:
    machine = Machine(flops_per_s=2e9, bytes_per_s=5e8)
    assert Cost(3_000_000, 1_000_000, 17).predicted_ms(machine) == pytest.approx(1.5 + 2.0)


def test_costs_add_up() -> None:
    assert Cost(3, 5, 7) + Cost(11, 13, 2) == Cost(14, 18, 7)


def test_layer_adds_its_projections() -> None:
    layer = MultiLevelAttention(42, 6, levels=SMALL, num_kv_heads=3)
    attention = cost(SMALL)
    rows = 2 * 19
    # queries, keys and values; output; scorer
    flops = 2 * rows * (42 * 84 + 42 * 42 + 42)
    moved = 4 * (42 * 84 + 42 * 42 + 42 + rows * (42 + 84 + 42 + 42 + 42 + 1))
    wanted = Cost(attention.flops + flops, attention.bytes_moved + moved, attention.peak_bytes + 4 * rows * 84)
    assert layer.cost(2, 19) == wanted
    half = MultiLevelAttention(42, 6, levels=SMALL, num_kv_heads=3, dtype=torch.bfloat16).cost(2, 19)
    assert half.flops == wanted.flops
    assert half.bytes_moved < wanted.bytes_moved
    dense = MultiLevelAttention(42, 6, levels=None, is_causal=True).cost(2, 19)
    assert dense.flops == cost(None, num_kv_heads=6, is_causal=True).flops + 2 * rows * (42 * 126 + 42 * 42)


def test_work_of_every_implementation() -> None:
    # two rows of 19 tokens with two heads of each class, 7 features
    rows, moved, near = 2 * 19, 18 * 2 * 19 * 7 * 4, 6 * 2 * 19 * 5
    tail = 2 * 2 * 19 * (1 + 5 + 4)
    wanted = Work(1, 0, 0, moved, 0, near, tail, 7 * (near + tail), rows * 6 * 7, 0)
    assert amounts(SMALL, "native") == wanted
    assert amounts(SMALL, "blocked") == wanted._replace(classes=3)
    near, tail = 2 * 2 * 19 * 5, 2 * 2 * (5 * 5 + 3 * 3)
    pooled = rows * 4 * 7 * 4
    wanted = Work(1, 2, 0, moved, 0, near, tail, 7 * (near + tail), 0, pooled)
    # torch runs the regional and the global heads of `strict` either way
    assert amounts(STRICT, "native") == wanted
    assert amounts(STRICT, "blocked") == wanted._replace(classes=3, heads=2)
    alone = replace(STRICT, ratio=LevelRatio(1, 0, 0))
    assert amounts(alone, "native") == Work(1, 0, 0, moved, 0, 3 * near, 0, 7 * 3 * near, 0, 0)
    assert amounts(alone, "blocked")[1:3] == (1, 2 * 3)
    pairs = 2 * 6 * 19 * 19
    wanted = Work(1, 0, 0, moved, 0, pairs, 0, 7 * pairs, 0, 0)
    assert amounts(None, "dense") == amounts(replace(SMALL, window=37), "native") == wanted
    assert amounts(None, "dense", is_causal=True).near == 2 * 6 * 19 * 20 // 2
    assert amounts(SMALL, "native", is_causal=True).near == 6 * 2 * 19 * 3


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_large_outputs_are_fresh(dtype: torch.dtype, size: int) -> None:
    # a token takes 4 KiB in each of the four tensors
    sizes: dict[str, Any] = {"batch": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 1024 // size, "dtype": dtype}
    tokens = FRESH_BYTES // 2**12
    assert amounts(SMALL, "native", tokens=tokens - 1, **sizes)[3:5] == (4 * FRESH_BYTES - 2**14, 0)
    assert amounts(SMALL, "native", tokens=tokens, **sizes)[3:5] == (4 * FRESH_BYTES, FRESH_BYTES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["native", "blocked", "dense"])
def test_without_a_calibration_the_shipped_rates_predict(impl: PredictedImpl, dtype: torch.dtype) -> None:
    levels = None if impl == "dense" else SMALL
    assert calibration.current() is None
    found = predicted_ms(
        levels, batch=2, num_heads=6, num_kv_heads=3, tokens=19, head_dim=7, dtype=dtype, impl=impl
    )  # fmt: skip
    rates = shipped.CALIBRATION.rates[impl, str(dtype).removeprefix("torch.")]
    own = amounts(levels, impl, dtype=dtype)
    assert found == pytest.approx(1e-6 * sum(rate * amount for rate, amount in zip(rates, own, strict=True)))
    assert {"cpu", "isa", "threads"} <= set(shipped.CALIBRATION.machine)


# invariants


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 3000),
    window=st.integers(0, 40),
    region_size=st.integers(1, 100),
    chosen=st.integers(1, 100),
    union=st.booleans(),
    is_causal=st.booleans(),
)
def test_more_of_anything_costs_no_less(
    tokens: int, window: int, region_size: int, chosen: int, union: bool, is_causal: bool
) -> None:
    levels = replace(
        SMALL, window=2 * window + 1, region_size=region_size, num_global_tokens=chosen, union=union, num_sinks=1
    )
    base = cost(levels, tokens=tokens, is_causal=is_causal)
    if window >= tokens - 2:
        # a window over everything is dense attention, which is another and cheaper computation
        return
    for more in (
        cost(replace(levels, num_global_tokens=chosen + 1), tokens=tokens, is_causal=is_causal),
        cost(replace(levels, num_sinks=2), tokens=tokens, is_causal=is_causal),
        cost(levels, tokens=tokens + 1, is_causal=is_causal),
        cost(levels, tokens=tokens, is_causal=is_causal, head_dim=8),
        cost(levels, tokens=tokens, is_causal=is_causal, batch=3),
    ):
        assert more.flops >= base.flops
        assert more.bytes_moved >= base.bytes_moved
        assert more.peak_bytes >= base.peak_bytes


@pytest.mark.parametrize(
    "levels", [SMALL, STRICT, replace(SMALL, union=True), None], ids=["calibrated", "strict", "union", "dense"]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_work_grows_with_the_rows(levels: Levels | None, is_causal: bool) -> None:
    one, three = (cost(levels, batch=batch, is_causal=is_causal) for batch in (1, 3))
    assert (three.flops, three.bytes_moved) == (3 * one.flops, 3 * one.bytes_moved)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("union", [False, True])
def test_levels_grow_linearly_and_dense_attention_does_not(is_causal: bool, union: bool) -> None:
    levels = replace(SMALL, union=union, region_size=None, num_regions=7)
    short, long = (cost(levels, tokens=n, is_causal=is_causal) for n in (10_000, 80_000))
    assert long.flops == 8 * short.flops
    assert long.bytes_moved == 8 * short.bytes_moved
    assert long.peak_bytes <= 8 * short.peak_bytes
    short, long = (cost(None, tokens=n, is_causal=is_causal) for n in (10_000, 80_000))
    assert long.flops > 63 * short.flops
    assert long.peak_bytes == 8 * short.peak_bytes
    assert cost(None, tokens=80_000, impl="materialised").peak_bytes > 2 * 2 * 6 * 4 * 80_000**2


def test_the_bench_problem_is_an_order_cheaper_than_dense() -> None:
    levels = Levels(region_size=None, num_regions=128)
    machine = Machine(flops_per_s=1e11, bytes_per_s=1e10)
    sizes: dict[str, Any] = {"batch": 1, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "tokens": 8192}
    own, dense = attention_cost(levels, **sizes), attention_cost(None, **sizes)
    assert dense.flops > 50 * own.flops
    assert dense.predicted_ms(machine) > 10 * own.predicted_ms(machine)
    assert attention_cost(replace(levels, mode="strict"), **sizes).predicted_ms(machine) < own.predicted_ms(machine)


def test_machine_is_measured_once() -> None:
    machine = measure_machine()
    assert machine is measure_machine()
    # a pocket calculator and a data centre
    assert 1e7 < machine.flops_per_s < 1e16
    assert 1e7 < machine.bytes_per_s < 1e14


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["calibrated", "strict", "sdpa", "materialised"])
def test_prediction_is_within_a_factor_of_five_of_the_clock(kind: str) -> None:
    levels = {"calibrated": Levels(), "strict": Levels(mode="strict")}.get(kind)
    tokens = 4096 if levels else 2048
    query = torch.randn(1, 8, tokens, 64)

    def call() -> torch.Tensor:
        if levels is not None:
            return multi_level_attention(query, query, query, levels=levels)
        if kind == "sdpa":
            return torch.nn.functional.scaled_dot_product_attention(query, query, query)
        return torch.softmax((query * 0.125) @ query.transpose(-1, -2), -1) @ query

    predicted = attention_cost(
        levels, batch=1, num_heads=8, num_kv_heads=8, tokens=tokens, head_dim=64,
        impl="materialised" if kind == "materialised" else "blocked",
    ).predicted_ms(measure_machine())  # fmt: skip
    best = float("inf")
    with torch.no_grad():
        for _ in range(9):
            start = time.perf_counter()
            call()
            best = min(best, 1e3 * (time.perf_counter() - start))
    assert predicted / 5 < best < predicted * 5


# messages


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost(SMALL, tokens=0), r"a cost needs tokens >= 1, got 0"),
        (lambda: cost(SMALL, batch=0), r"a cost needs batch >= 1, got 0"),
        (lambda: cost(None, head_dim=-1), r"a cost needs head_dim >= 1, got -1"),
        (lambda: entry_counts(None, tokens=-3), r"a cost needs tokens >= 1, got -3"),
        (lambda: cost(None, num_heads=5), r"num_heads=5 is no positive multiple of num_kv_heads=3"),
        (lambda: cost(SMALL, impl="materialised"), r"impl='materialised' is dense attention.*needs levels=None"),
        (lambda: amounts(SMALL, "native", tokens=0), r"a cost needs tokens >= 1, got 0"),
        (lambda: amounts(None, "native"), r"impl='native' does not go with levels=None; 'dense' is the one"),
        (lambda: amounts(SMALL, "dense"), r"impl='dense' does not go with levels=Levels"),
        (lambda: amounts(SMALL, "triton"), r"impl='triton' is unknown; use one of native, blocked, dense"),  # type: ignore[arg-type]
        (
            lambda: predicted_ms(
                SMALL, batch=2, num_heads=6, num_kv_heads=3, tokens=19, head_dim=7, dtype=torch.float64
            ),
            r"dtype=torch.float64 has no measured rates; use torch.float32 or torch.bfloat16",
        ),
        (lambda: Machine(flops_per_s=0.0, bytes_per_s=1.0), r"both rates must be > 0. Use measure_machine\(\)"),
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(ConfigError, match=r"impl='native' is unknown; use 'blocked' or 'materialised'"):
        cost(None, impl="native")  # type: ignore[arg-type]
