"""The decode cache: token by token equals the whole causal call, in memory that does not grow with the tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import BASE, Case, inputs
from tests.attention.oracle import oracle
from trilevel.attention.api import multi_level_attention
from trilevel.attention.cache import DecodeCache
from trilevel.attention.cache_levels import RunningSum
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError, ShapeError

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}


def case(
    name: str, *, extras: bool = True, scale: float | None = None, without: tuple[str, ...] = (), **o: Any
) -> Case:
    heads, kv_heads = o.pop("heads", 3), o.pop("kv_heads", 3)
    return Case(
        name=name, levels=replace(BASE, **o), heads=heads, kv_heads=kv_heads, is_causal=True, tokens=31,
        extras=extras, scale=scale, without=without,
    )  # fmt: skip


CASES = [
    case("base"),
    case("no_extras", extras=False),
    case("score_only", without=("global_forced", "global_prior", "pool_weight")),
    case("scale", scale=0.31),
    case("window_1", window=1),
    case("window_7", window=7),
    case("window_13_over_regions", window=13),
    case("window_over_all", window=83),
    case("regions_of_1", region_size=1),
    case("regions_of_5", region_size=5, window=5),
    case("no_regions", ratio=LevelRatio(2, 0, 1), region_size=None, num_regions=3),
    case("one_large_region", region_size=97),
    case("one_global", num_global_tokens=1),
    case("all_global", num_global_tokens=97),
    case("sinks", num_sinks=2),
    case("sinks_over_window", num_sinks=7),
    case("all_sinks", num_sinks=97),
    case("union", union=True, num_global_tokens=5),
    case("union_window_1", union=True, window=1, num_global_tokens=5, region_size=3),
    case("union_all_global", union=True, num_global_tokens=97),
    case("union_wide_window", union=True, window=15, num_global_tokens=5),
    case("gate", selection_gradient="gate"),
    case("gate_no_extras", selection_gradient="gate", extras=False),
    case("union_gate", union=True, selection_gradient="gate"),
    case("chunk_1", selection_chunk=1),
    case("chunk_7", selection_chunk=7, union=True),
    case("chunk_97", selection_chunk=97),
    case("grouped", heads=10, kv_heads=5, ratio=LevelRatio(2, 1, 2)),
    case("grouped_uneven", heads=14, kv_heads=7, ratio=LevelRatio(6, 3, 1), num_sinks=1),
    case("local_only", heads=2, kv_heads=1, ratio=LevelRatio(1, 0, 0)),
    case("regional_only", heads=2, kv_heads=1, ratio=LevelRatio(0, 1, 0)),
    case("global_only", heads=2, kv_heads=1, ratio=LevelRatio(0, 0, 1), union=True),
]
# 1, 2, w, w + 1, s - 1, s, s + 1 and primes
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 17, 23]


def cache_for(case: Case, dtype: torch.dtype = torch.float64) -> DecodeCache:
    return DecodeCache(
        case.levels, num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim, batch=case.batch, dtype=dtype
    )


def score_of(given: dict[str, Any]) -> Tensor | None:
    score, prior = given.get("global_score"), given.get("global_prior")
    return score if prior is None or score is None else score + prior


def part(x: Tensor | None, start: int, stop: int, axis: int = 1) -> Tensor | None:
    return None if x is None else x.narrow(axis, start, stop - start)


def decode(case: Case, given: dict[str, Any], cache: DecodeCache, prompt: int = 0, stop: int | None = None) -> Tensor:
    """Outputs of the tokens after the prompt, (batch, heads, tokens - prompt, dim)."""
    score, forced, pool = score_of(given), given.get("global_forced"), given.get("pool_weight")
    if prompt:
        key, value = given["key"][:, :, :prompt], given["value"][:, :, :prompt]
        cache.prefill(key, value, score=part(score, 0, prompt), forced=part(forced, 0, prompt), pool_weight=pool)
    rows = []
    for i in range(prompt, case.tokens if stop is None else stop):
        one = slice(i, i + 1)
        rows.append(
            cache.step(
                given["query"][:, :, one], given["key"][:, :, one], given["value"][:, :, one],
                score=part(score, i, i + 1), forced=part(forced, i, i + 1), pool_weight=pool, scale=case.scale,
            )
        )  # fmt: skip
    return torch.cat(rows, 2)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("base", "union_gate", "sinks_over_window")], ids=str)
def test_steps_follow_the_definition(case: Case) -> None:
    case = replace(case, tokens=23)
    given = inputs(case)
    wanted, _ = oracle(**given)
    torch.testing.assert_close(decode(case, given, cache_for(case)), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_the_whole_call(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    wanted = multi_level_attention(**given)
    out = decode(case, given, cache_for(case, dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", LENGTHS)
def test_every_length(tokens: int) -> None:
    # a longer call must not differ from a shorter one, so each length is a call of its own
    for levels in (replace(BASE, window=7, region_size=6, num_sinks=1), replace(BASE, union=True, region_size=5)):
        short = Case(name="length", levels=levels, tokens=tokens, is_causal=True)
        given = inputs(short)
        wanted = multi_level_attention(**given, impl="reference")
        torch.testing.assert_close(decode(short, given, cache_for(short)), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prompt", LENGTHS)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("base", "sinks_over_window", "union_wide_window", "gate", "chunk_7", "chunk_97")],
    ids=str,
)
def test_prompt_then_steps_equal_the_whole_call(case: Case, prompt: int) -> None:
    given = inputs(case)
    wanted = multi_level_attention(**given)[:, :, prompt:]
    torch.testing.assert_close(decode(case, given, cache_for(case), prompt), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prompts_of_every_configuration(case: Case) -> None:
    given = inputs(case)
    wanted = multi_level_attention(**given)[:, :, 19:]
    torch.testing.assert_close(decode(case, given, cache_for(case), 19), wanted, rtol=1e-11, atol=1e-11)


def test_an_empty_prompt_leaves_the_cache_empty() -> None:
    one = CASES[0]
    cache, given = cache_for(one), inputs(one)
    cache.prefill(given["key"][:, :, :0], given["value"][:, :, :0])
    assert cache.num_tokens == 0
    torch.testing.assert_close(decode(one, given, cache), multi_level_attention(**given), rtol=1e-11, atol=1e-11)


def test_a_displaced_token_returns_to_the_remainder() -> None:
    """The first global token is far above all others in value; once displaced only the remainder holds it."""
    levels = Levels(ratio=LevelRatio(0, 0, 1), window=1, region_size=4, num_global_tokens=1, selection_chunk=1)
    cache = DecodeCache(levels, num_heads=1, num_kv_heads=1, head_dim=1, batch=1)
    zero = torch.zeros(1, 1, 1, 1)
    outs = []
    for score, value in ((1.0, 60.0), (0.0, 0.0), (2.0, 0.0), (0.0, 0.0)):
        outs.append(cache.step(zero, zero, zero + value, score=torch.tensor([[score]])).item())
    # all keys are 0, so that every output is the plain mean of all visible values
    assert outs == pytest.approx([60.0, 30.0, 20.0, 15.0], rel=1e-6)


def test_bfloat16_keeps_its_sums_in_float32() -> None:
    wide = Case(name="wide", levels=BASE, tokens=301, is_causal=True)
    given = inputs(wide, torch.bfloat16)
    out = decode(wide, given, cache_for(wide, torch.bfloat16))
    exact: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()
    }
    # the sum of score and prior is rounded to bfloat16 before it is compared
    exact["global_score"] = (given["global_score"] + given["global_prior"]).double()
    del exact["global_prior"]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), multi_level_attention(**exact), rtol=1e-2, atol=5e-3)


def test_a_sum_of_many_terms_keeps_its_digits() -> None:
    terms = 1 + torch.randn(20_011, 3, generator=torch.Generator().manual_seed(1))
    running, plain = RunningSum(torch.zeros(3)), torch.zeros(3)
    for term in terms:
        running.add(term)
        plain = plain + term
    exact = terms.double().sum(0)
    assert (running.total - exact).abs().max() <= exact.max() * 2**-23
    # what the compensation is for
    assert (plain - exact).abs().max() > 8 * exact.max() * 2**-23


@pytest.mark.parametrize("union", [False, True])
def test_memory_stays_while_tokens_grow(union: bool) -> None:
    window, chunk, p, sinks, dim, heads = 9, 7, 11, 3, 5, 3
    levels = replace(
        BASE, window=window, region_size=1009, num_global_tokens=p, num_sinks=sinks, selection_chunk=chunk, union=union
    )
    many = Case(name="many", levels=levels, tokens=401, dim=dim, batch=1, is_causal=True, extras=False)
    given = inputs(many, torch.float32)
    cache = cache_for(many, torch.float32)
    empty = cache.num_bytes
    decode(many, given, cache, stop=67)
    after_some = cache.num_bytes
    decode(many, given | {k: given[k][:, :, 67:] for k in ("query", "key", "value")}, cache, stop=401 - 67)
    assert cache.num_tokens == 401
    assert cache.num_bytes == after_some
    # keys and values of the window, sinks, global tokens and the open chunk; sums, scores and positions
    vectors = heads * 5 + sinks + p + chunk + 12
    assert empty < after_some <= 4 * (2 * vectors * dim + 4 * (p + chunk) + 16)


def test_regions_grow_by_one_summary_each() -> None:
    levels = replace(BASE, ratio=LevelRatio(0, 1, 0), region_size=4)
    many = Case(name="many", levels=levels, tokens=512, dim=5, heads=1, kv_heads=1, batch=1, is_causal=True)
    given = inputs(many, torch.float32)
    cache = cache_for(many, torch.float32)
    before = cache.num_bytes
    decode(many, given, cache)
    assert cache.num_bytes - before == 128 * 2 * 5 * 4


def test_rows_do_not_see_each_other() -> None:
    one = replace(CASES[0], batch=3)
    given = inputs(one)
    other = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    for name in ("query", "key", "value", "global_score"):
        other[name][0] = torch.nan
    assert torch.equal(decode(one, given, cache_for(one))[1:], decode(one, other, cache_for(one))[1:])


@pytest.mark.parametrize("name", ["query", "key", "value", "global_score"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("prompt", [0, 19])
def test_rows_that_see_a_non_finite_token_are_nan(name: str, bad: float, prompt: int) -> None:
    one = CASES[0]
    given = inputs(one)
    given[name][(1, 17) if name == "global_score" else (1, 2, 17, 3)] = bad
    out = decode(one, given, cache_for(one), prompt)
    wanted = multi_level_attention(**given, impl="blocked")[:, :, prompt:]
    assert torch.equal(out.isnan(), wanted.isnan())
    torch.testing.assert_close(out, wanted, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_no_gradient_is_kept() -> None:
    one = CASES[0]
    given = inputs(one)
    for name in ("query", "key", "value", "pool_weight", "global_score"):
        given[name].requires_grad_(True)
    assert not decode(one, given, cache_for(one), 7).requires_grad


LAYER_DIM = 36


def layer(levels: Levels | None, **options: Any) -> MultiLevelAttention:
    made = MultiLevelAttention(LAYER_DIM, 6, levels=levels, num_kv_heads=3, rope_theta=100.0, **options).double()
    draw = torch.Generator().manual_seed(11)
    for parameter in made.parameters():
        with torch.no_grad():
            parameter.normal_(std=0.3, generator=draw)
    return made


def tokens() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(2, 23, LAYER_DIM, dtype=torch.float64, generator=draw), torch.randn(
        2, 23, generator=draw
    ).double()


@pytest.mark.parametrize("prompt", [0, 1, 11, 22])
@pytest.mark.parametrize(
    "levels", [replace(BASE, num_sinks=1), replace(BASE, ratio=LevelRatio(2, 1, 0))], ids=["each", "no_global"]
)
def test_layer_decodes(levels: Levels, prompt: int) -> None:
    attention, (x, prior) = layer(levels, is_causal=True), tokens()
    cache = attention.new_cache(2)
    outs = [attention.prefill(x[:, :prompt], cache, global_prior=prior[:, :prompt])] if prompt else []
    for x_i, prior_i in zip(x[:, prompt:].split(1, 1), prior[:, prompt:].split(1, 1), strict=True):
        outs += [attention.step(x_i, cache, global_prior=prior_i)]
    assert cache.num_tokens == 23
    wanted = attention(x, global_prior=prior)
    torch.testing.assert_close(torch.cat(outs, 1), wanted, rtol=1e-11, atol=1e-11)


def test_layer_needs_no_prior() -> None:
    attention, (x, _) = layer(BASE, is_causal=True), tokens()
    cache = attention.new_cache(2)
    outs = [attention.prefill(x[:, :13], cache), *(attention.step(x[:, i : i + 1], cache) for i in range(13, 23))]
    torch.testing.assert_close(torch.cat(outs, 1), attention(x), rtol=1e-11, atol=1e-11)


def test_cache_has_the_type_of_the_parameters() -> None:
    attention = layer(BASE, is_causal=True).to(torch.bfloat16)
    x = torch.ones(3, 1, LAYER_DIM, dtype=torch.bfloat16)
    assert attention.step(x, attention.new_cache(3)).dtype == torch.bfloat16


# messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "strict"}, r"mode='strict' is bidirectional; decoding needs mode='calibrated'"),
        ({"region_size": None, "num_regions": 3}, r"num_regions=3 needs the whole length; decoding needs region_size"),
        ({"dense_below": 9}, r"dense_below=9 makes earlier outputs depend on the final length.*Set dense_below=None"),
    ],
)
def test_levels_that_cannot_be_decoded(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecodeCache(replace(BASE, **changes), num_heads=3, num_kv_heads=3, head_dim=5, batch=1)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("query", torch.zeros(2, 3, 2, 5), r"query must have shape \(2, 3, 1, 5\) for this cache, got \(2, 3, 2, 5\)"),
        ("key", torch.zeros(1, 3, 1, 5), r"key must have shape \(2, 3, 1, 5\)"),
        ("value", torch.zeros(2, 3, 1, 7), r"value must have shape"),
        ("key", torch.zeros(2, 3, 1, 5).bfloat16(), r"key must be torch.float32 as the cache, got torch.bfloat16"),
        ("score", torch.zeros(2), r"score must have shape \(2, 1\)"),
        ("forced", torch.zeros(1, 1).bool(), r"forced must have shape \(2, 1\)"),
        ("forced", torch.zeros(2, 1), r"forced must be bool, got torch.float32; call .bool\(\)"),
        ("pool_weight", torch.zeros(5), r"pool_weight must have shape \(3, 5\)"),
    ],
)
def test_what_a_step_needs(name: str, given: Tensor, message: str) -> None:
    cache = DecodeCache(BASE, num_heads=3, num_kv_heads=3, head_dim=5, batch=2)
    fine: dict[str, Any] = dict.fromkeys(("query", "key", "value"), torch.zeros(2, 3, 1, 5))
    with pytest.raises(ShapeError, match=message):
        cache.step(**(fine | {name: given}))
    assert cache.num_tokens == 0


def test_more_forced_than_global_tokens() -> None:
    cache = DecodeCache(replace(BASE, num_global_tokens=2), num_heads=3, num_kv_heads=3, head_dim=5, batch=2)
    x, forced = torch.zeros(2, 3, 2, 5), torch.tensor([[True, True], [False, True]])
    cache.prefill(x, x, forced=forced)
    one = x[:, :, :1]
    cache.step(one, one, one, forced=torch.tensor([[False], [True]]))
    message = r"forced marks 3 tokens of a row so far, num_global_tokens=2 holds fewer. Raise num_global_tokens"
    with pytest.raises(ShapeError, match=message):
        cache.step(one, one, one, forced=torch.tensor([[True], [False]]))
    assert cache.num_tokens == 3


def test_a_prompt_needs_an_empty_cache() -> None:
    cache = DecodeCache(BASE, num_heads=3, num_kv_heads=3, head_dim=5, batch=2)
    x = torch.zeros(2, 3, 7, 5)
    with pytest.raises(ShapeError, match=r"key must have shape \(2, 3, 0, 5\)"):
        cache.prefill(x[0], x[0])
    cache.prefill(x, x)
    with pytest.raises(ConfigError, match=r"the cache holds 7 tokens and must be empty. Use step, or a new cache"):
        cache.prefill(x, x)


@pytest.mark.parametrize(("levels", "is_causal"), [(None, True), (BASE, False)])
def test_layers_that_cannot_decode(levels: Levels | None, is_causal: bool) -> None:
    with pytest.raises(ConfigError, match=r"needs a causal layer with levels in all heads, got is_causal="):
        layer(levels, is_causal=is_causal).new_cache(1)


def test_a_layer_takes_its_own_cache_only() -> None:
    attention, (x, prior) = layer(BASE, is_causal=True), tokens()
    other = layer(replace(BASE, window=5), is_causal=True).new_cache(2)
    for call in (attention.step, attention.prefill):
        with pytest.raises(ConfigError, match=r"made for other levels; make it with new_cache"):
            call(x[:, :1], other)
        with pytest.raises(ShapeError, match=r"x must be \(batch, tokens, 36\), got \(2, 36\)"):
            call(x[:, 0], other)
        with pytest.raises(ShapeError, match=r"global_prior must have shape \(2, 1\), got \(2, 23\)"):
            call(x[:, :1], attention.new_cache(2), global_prior=prior)
