"""What must not change the answer of `native`: threads, neighbours, padding, the future, what nobody may see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attention.cases import BASE, CALIBRATED, STRICT, Case, clone, gradients, inputs
from tests.attention.exactness import assert_exact, results, round_scores
from tests.attention.test_implementations import KINDS
from tests.attention.test_invariants import CAUSAL, LEVELS, TOKEN_AXIS, VECTORS, garbage, take_rows
from trilevel.attention import library
from trilevel.attention.api import multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.attention.native import build

pytestmark = pytest.mark.skipif(not library.is_available(), reason=f"no native library: {build.AGAIN}")

DTYPES = [torch.float32, torch.bfloat16]
WAYS = pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
# rounding in float32, where the order of a sum may differ
TOLERANCE = 1e-5
LONG = Levels(ratio=LevelRatio(1, 1, 1), window=33, region_size=16, num_global_tokens=31, num_sinks=2)
LONG_CASES = [
    Case(name="plain", tokens=601, dim=16, levels=LONG),
    Case(name="union", tokens=601, dim=17, levels=replace(LONG, union=True, selection_gradient="gate")),
    Case(name="padding", tokens=601, dim=8, levels=LONG, padding="scattered", segments=((300, 1, 150), (7, 590))),
    Case(name="grouped", tokens=601, dim=8, heads=6, levels=replace(LONG, region_size=1)),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attend(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return multi_level_attention(**arguments, impl="native", return_lse=True)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert not [name for name in wanted if not found[name].equal(wanted[name])]


@pytest.mark.parametrize("dtype", DTYPES)
@WAYS
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_the_number_of_threads_changes_not_a_bit(case: Case, is_causal: bool, dtype: torch.dtype) -> None:
    arguments = round_scores(inputs(replace(case, is_causal=is_causal), dtype))
    torch.set_num_threads(1)
    wanted = results(arguments, "native")
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same(results(arguments, "native"), wanted)


# strict's other heads are torch's products, whose sums depend on the size of the batch
STRICT_LOCAL = Case(name="strict_local", levels=replace(STRICT, ratio=LevelRatio(1, 0, 0)), padding="scattered")
ROWS = [*CALIBRATED, STRICT_LOCAL, *LONG_CASES, *(replace(case, is_causal=True) for case in LONG_CASES)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_a_row_does_not_depend_on_its_batch(case: Case, dtype: torch.dtype) -> None:
    arguments = inputs(case, dtype)
    # what each row alone gives to a gradient that the rows share is not to be told
    alone = {name: x for name, x in arguments.items() if name != "global_prior"}
    leaves = clone(alone, requires_grad=True)
    out, lse = attend(leaves)
    slope = torch.randn(out.shape[1:]).to(dtype)
    (out * slope).sum().backward()
    for order in ([0], [1], [1, 0, 1]):
        chosen = clone(take_rows(alone, torch.tensor(order)), requires_grad=True)
        found = attend(chosen)
        assert found[0].equal(out[order])
        assert found[1].equal(lse[order])
        (found[0] * slope).sum().backward()
        for name, gradient in gradients(chosen).items():
            assert name == "pool_weight" or gradient.equal(gradients(leaves)[name][order]), name


@pytest.mark.parametrize("amounts", [(0, 1), (0, 40), (1, 0), (19, 23), (16, 16)])
@WAYS
@pytest.mark.parametrize("name", LEVELS)
def test_padding_on_either_side_changes_nothing(name: str, is_causal: bool, amounts: tuple[int, int]) -> None:
    if is_causal and (LEVELS[name].mode == "strict" or LEVELS[name].region_size is None):
        return  # no such function; test_messages holds that it says so
    (left, right), size = amounts, 53
    case = Case(name=name, levels=replace(LEVELS[name], num_global_tokens=11), tokens=size, is_causal=is_causal)
    bare = round_scores(inputs(case, torch.float32))
    padded = inputs(replace(case, tokens=left + size + right), torch.float32, seed=8)
    real = slice(left, left + size)
    for key, value in bare.items():
        if isinstance(value, Tensor) and key != "pool_weight":
            padded[key][(slice(None),) * TOKEN_AXIS.get(key, 1) + (real,)] = value
    padded["pool_weight"] = bare["pool_weight"]
    padded["padding_mask"] = torch.ones(2, left + size + right, dtype=torch.bool)
    padded["padding_mask"][:, real] = False
    out, lse = attend(padded)
    for found, wanted in zip((out[:, :, real], lse[:, :, real]), attend(bare), strict=True):
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    outside = padded["padding_mask"][0]
    assert not out[:, :, outside].any()
    assert (lse[:, :, outside] == -torch.inf).all()


@WAYS
@pytest.mark.parametrize("name", ["calibrated", "union_gate_sinks"])
def test_packed_segments_equal_separate_calls(name: str, is_causal: bool) -> None:
    lengths = (1, 37, 16, 5, 40)
    case = Case(name=name, levels=LEVELS[name], tokens=sum(lengths), is_causal=is_causal, without=("global_forced",))
    arguments = round_scores(inputs(case, torch.float32))
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    out, lse = attend({**arguments, "segment_ids": ids})
    start = 0
    for length in lengths:
        place = slice(start, start + length)
        part = {
            key: x[(slice(None),) * TOKEN_AXIS.get(key, 1) + (place,)]
            if isinstance(x, Tensor) and key != "pool_weight"
            else x
            for key, x in arguments.items()
        }
        for found, wanted in zip((out[:, :, place], lse[:, :, place]), attend(part), strict=True):
            torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
        start += length


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CAUSAL, *(replace(c, is_causal=True) for c in LONG_CASES[:3])], ids=str)
def test_the_future_changes_not_a_bit_selection_included(case: Case, dtype: torch.dtype) -> None:
    arguments = inputs(case, dtype)
    wanted = attend(arguments)
    for now in (0, 4, 11, 17, 255, 256, 400):
        if now >= case.tokens:
            break
        changed, future = clone(arguments), inputs(case, dtype, seed=now + 100)
        for name in ("query", "key", "value", "global_score", "global_prior"):
            if name in changed:
                after = (slice(None),) * TOKEN_AXIS.get(name, 1) + (slice(now + 1, None),)
                # scores far above all others: a selection that looks ahead takes them
                changed[name][after] = 30 * future[name][after] + (50 if "global" in name else 0)
        for found, before in zip(attend(changed), wanted, strict=True):
            assert found[:, :, : now + 1].equal(before[:, :, : now + 1]), now


@WAYS
def test_the_future_gets_the_gradient_of_those_that_see_it(is_causal: bool) -> None:
    leaves = clone(inputs(replace(LONG_CASES[0], is_causal=is_causal), torch.float32), requires_grad=True)
    out, _ = attend(leaves)
    out[:, :, :300].square().sum().backward()
    for name in ("key", "value"):
        assert bool(leaves[name].grad[:, :, 300:].any()) is not is_causal
    assert not leaves["query"].grad[:, :, 300:].any()


def hide(case: Case, where: Tensor, bad: float, dtype: torch.dtype, names: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """Results of rows that do not see `where` and all gradients of a loss on them, with 0 and with `bad` there."""
    both = []
    for value in (0.0, bad):
        leaves = clone(garbage(inputs(case, dtype), where, value, names), requires_grad=True)
        out, lse = attend(leaves)
        seen = (~where)[:, None].expand_as(lse)
        kept, kept_lse = out[seen], lse[seen]
        (kept.square().sum() + kept_lse[kept_lse.isfinite()].sum()).backward()
        both.append({"out": kept.detach(), "lse": kept_lse.detach(), **gradients(leaves)})
    return both


def assert_hidden(clean: dict[str, Tensor], dirty: dict[str, Tensor]) -> None:
    """Nothing shows; a tile that read NaN is computed again with its sums in another order."""
    is_float32 = clean["out"].dtype == torch.float32
    for name, wanted in clean.items():
        finite = wanted.isfinite()
        assert dirty[name].isfinite().equal(finite), f"{name} is finite elsewhere"
        wanted = wanted[finite]
        if is_float32 and name in ("out", "lse"):
            bound = 4 * torch.finfo(torch.float32).eps * max(1.0, float(wanted.abs().max()))
        else:
            bound = (10 * TOLERANCE if is_float32 else 2**-6) * max(1.0, float(wanted.abs().max()))
        assert (dirty[name][finite] - wanted).abs().max() <= bound, f"{name} differs"


# the last is finite: sums over what nobody may see would drown in it
BAD = [float("nan"), float("inf"), -float("inf"), 1e15]
# each tensor by itself is the slow variant
SOME = ["all", "value", *(pytest.param(name, marks=pytest.mark.slow) for name in ("key", "query", "score"))]
NAMES = {"all": VECTORS, "key": ("key",), "value": ("value",), "query": ("query",), "score": ("global_score",)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["left", "scattered"])
@pytest.mark.parametrize("name", LEVELS)
def test_padding_never_leaks(name: str, kind: str, bad: float, dtype: torch.dtype) -> None:
    case = Case(name=name, levels=LEVELS[name], padding=kind, tokens=37)
    clean, dirty = hide(case, inputs(case)["padding_mask"], bad, dtype, VECTORS)
    assert_same(dirty, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", NAMES)
@pytest.mark.parametrize("name", ["calibrated", "union_gate_sinks"])
def test_the_future_never_leaks(name: str, which: str, bad: float, dtype: torch.dtype) -> None:
    case = Case(name=name, levels=LEVELS[name], is_causal=True, without=("global_forced",), tokens=37)
    for now in (6, 15, 30):
        where = (torch.arange(37) > now).expand(2, -1)
        clean, dirty = hide(case, where, bad, dtype, NAMES[which])
        assert_hidden(clean, dirty)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", SOME)
@WAYS
@pytest.mark.parametrize("name", LEVELS)
def test_other_segments_never_leak(name: str, is_causal: bool, which: str, bad: float, dtype: torch.dtype) -> None:
    if is_causal and (LEVELS[name].mode == "strict" or LEVELS[name].region_size is None):
        return  # no such function; test_messages holds that it says so
    case = Case(
        name=name, levels=LEVELS[name], is_causal=is_causal, segments=((5, 17), (3, 0, 29)), tokens=37,
        without=("global_forced",),
    )  # fmt: skip
    for segment in (0, 1):
        clean, dirty = hide(case, inputs(case)["segment_ids"] == segment, bad, dtype, NAMES[which])
        assert_hidden(clean, dirty)
        if dtype == torch.float32 and LEVELS[name].mode == "calibrated":
            # no tile of one segment reads another one's rows
            assert dirty["out"].equal(clean["out"])
            assert dirty["lse"].equal(clean["lse"])


@pytest.mark.parametrize("bad", BAD[:3])
@pytest.mark.parametrize("name", ["query", "key", "value", "global_score"])
@WAYS
@pytest.mark.parametrize("padding", [None, "left"])
def test_what_is_seen_and_not_finite_shows(padding: str | None, is_causal: bool, name: str, bad: float) -> None:
    for one_feature in (False, True):
        case = Case(name=name, is_causal=is_causal, padding=padding, tokens=41, without=("global_forced",))
        arguments = inputs(case, torch.float32)
        at = (0, 20) if name == "global_score" else (0, slice(None), 20, 0 if one_feature else slice(None))
        arguments[name][at] = bad
        out, _ = attend(arguments)
        shows = ~out[0].isfinite().all(-1)
        wanted = torch.zeros_like(shows)
        if name == "query":
            wanted[:, 20] = True
        else:
            heads = slice(2, 3) if name == "global_score" else slice(None)
            wanted[heads, 20 if is_causal else 2 if padding else 0 :] = True
        assert shows.equal(wanted)
        assert out[1].isfinite().all()


@WAYS
def test_strict_local_heads_show_it_in_the_window_alone(is_causal: bool) -> None:
    levels = replace(BASE if is_causal else STRICT, ratio=LevelRatio(1, 0, 0), window=5)
    arguments = inputs(Case(name="near", levels=levels, is_causal=is_causal, tokens=41, extras=False), torch.float32)
    arguments["value"][0, :, 20] = torch.nan
    shows = ~attend(arguments)[0][0].isfinite().all(-1)
    last = 41 if is_causal else 23
    assert [row.nonzero().flatten().tolist() for row in shows] == [list(range(20 if is_causal else 18, last))] * 3


@pytest.mark.parametrize("names", [("key",), ("value",), ("query", "key", "value", "pool_weight")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_denormal_numbers(kind: str, names: tuple[str, ...]) -> None:
    arguments = round_scores(inputs(Case(name=kind, tokens=67, dim=8, **KINDS[kind]), torch.float32))
    for name in names:
        arguments[name] = arguments[name] * 1e-40
        assert arguments[name].abs().max() < torch.finfo(torch.float32).smallest_normal
        assert arguments[name].any()
    found = attend(arguments)
    for one, wanted in zip(found, multi_level_attention(**arguments, impl="reference", return_lse=True), strict=True):
        # the smallest step is 1.4e-45, a sum of weighted values has one for each of them
        small = float(wanted.abs().max()) < 1e-30
        torch.testing.assert_close(one, wanted, rtol=TOLERANCE, atol=67 * 1.5e-45 if small else TOLERANCE)
    assert found[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e2, 1e4, -1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_do_not_overflow(kind: str, scale: float, dtype: torch.dtype) -> None:
    options = {**KINDS[kind], "scale": scale, "without": ("region_gate",)}
    arguments = round_scores(inputs(Case(name=kind, tokens=67, dim=8, **options), dtype))
    found, wanted = results(arguments, "native"), results(arguments, "reference")
    assert found["out"].isfinite().all()
    # an average of values
    assert found["out"].abs().max() <= arguments["value"].abs().max() * (1 + 2**-7)
    finite = wanted["lse"].isfinite()
    assert found["lse"].isfinite().equal(finite)
    error = (found["lse"] - wanted["lse"])[finite].abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 2**-6) * wanted["lse"][finite].abs().max()
    for name in ("query", "key", "value", "pool_weight"):
        # probabilities are at most 1 in the backward pass as well
        assert found[name].isfinite().all(), name
        assert found[name].abs().max() <= 4 * wanted[name].abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@WAYS
def test_peaked_attention_has_exact_gradients(is_causal: bool, scale: float, dtype: torch.dtype) -> None:
    # log-sum-exps around 55 and 220: the backward pass must compute the very logits of the forward pass
    case = Case(name="peaked", tokens=67, dim=8, scale=scale, is_causal=is_causal, levels=replace(BASE, window=9))
    assert_exact(round_scores(inputs(case, dtype)))


@pytest.mark.parametrize("case", [c for c in CALIBRATED if c.heads == c.kv_heads and c.tokens == 19], ids=str)
def test_shifts_of_keys_and_values_pass_through(case: Case) -> None:
    # every key moved by a changes every logit of a query by scale * q.a, every value moved by b the average by b
    arguments = inputs(case, torch.float32)
    move_key, move_value = torch.randn(2, case.dim)
    moved = {**arguments, "key": arguments["key"] + move_key, "value": arguments["value"] + move_value}
    (out, lse), (moved_out, moved_lse) = attend(arguments), attend(moved)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    wanted = lse + scale * (arguments["query"] @ move_key)
    torch.testing.assert_close(moved_lse, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    wanted = out + move_value * lse.isfinite()[..., None]
    torch.testing.assert_close(moved_out, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("size", [40, 2**31 - 1, 2**31, 2**40])
@pytest.mark.parametrize("segments", [None, ((5, 11), (3, 0, 4, 7))])
@WAYS
def test_sizes_beyond_the_row_are_those_of_the_row(is_causal: bool, segments: Any, size: int) -> None:
    levels = replace(
        BASE, region_size=size, num_global_tokens=size, num_sinks=size, window=3,
        selection_chunk=size if is_causal and size % 2 else 4,
    )  # fmt: skip
    assert_exact(
        round_scores(inputs(Case(name="huge", levels=levels, is_causal=is_causal, segments=segments), torch.float32))
    )
    wide = replace(levels, window=2 * size + 1, region_size=4)
    assert_exact(
        round_scores(inputs(Case(name="wide", levels=wide, is_causal=is_causal, segments=segments), torch.float32))
    )


def test_logits_far_below_zero_still_share_the_values() -> None:
    arguments = inputs(Case(name="low", tokens=37, extras=False), torch.float32)
    for name, level in (("query", 1e16), ("key", -1e16), ("value", 1.0)):
        arguments[name] = torch.full_like(arguments[name], level)
    out, lse = attend(arguments)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=1e-6)
    assert (lse < -1e30).all()
