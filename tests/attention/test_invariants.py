"""What must not change the answer: padding, neighbours in the batch, packing, the future, garbage nobody may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.attention.cases import BASE, CALIBRATED, CASES, IMPLEMENTATIONS, STRICT, Case, clone, gradients, inputs
from trilevel.attention.api import Impl, multi_level_attention
from trilevel.attention.levels import LevelRatio, Levels

# outputs may differ by the order of float64 sums where the number of tokens differs
TOLERANCE = 1e-12
# the axis of tokens, where it is not 1
TOKEN_AXIS = {"query": 2, "key": 2, "value": 2}


def attend(arguments: dict[str, Any], impl: Impl) -> tuple[Tensor, Tensor]:
    return multi_level_attention(**arguments, impl=impl, return_lse=True)


def assert_equal(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def over_tokens(arguments: dict[str, Any], change: Any) -> dict[str, Any]:
    """`change(tensor, axis of tokens)` for every argument that has one."""
    return {
        name: change(value, TOKEN_AXIS.get(name, 1)) if isinstance(value, Tensor) and name != "pool_weight" else value
        for name, value in arguments.items()
    }


def take(arguments: dict[str, Any], index: Tensor) -> dict[str, Any]:
    return over_tokens(arguments, lambda x, axis: x.index_select(axis, index))


def take_rows(arguments: dict[str, Any], index: Tensor) -> dict[str, Any]:
    return {
        name: value[index] if isinstance(value, Tensor) and name != "pool_weight" else value
        for name, value in arguments.items()
    }


def garbage(arguments: dict[str, Any], where: Tensor, value: float, names: tuple[str, ...]) -> dict[str, Any]:
    """Copies with `value` in the named tensors at the (batch, tokens) places of `where`."""
    changed = clone(arguments)
    for name in names:
        if name in changed:
            x = changed[name]
            place = where[:, None, :, None] if x.ndim == 4 else where[..., None] if x.ndim == 3 else where
            changed[name] = x.masked_fill(place, value)
    return changed


VECTORS = ("query", "key", "value", "global_score", "global_prior", "region_gate")
LEVELS = {
    "calibrated": BASE,
    "num_regions": replace(BASE, region_size=None, num_regions=3),
    "union_gate_sinks": replace(BASE, union=True, selection_gradient="gate", num_sinks=2),
    "strict": STRICT,
    "strict_num_regions": replace(STRICT, region_size=None, num_regions=3),
}


@st.composite
def some_levels(draw: st.DrawFn, *, causal: bool) -> Levels:
    levels = draw(st.sampled_from([v for v in LEVELS.values() if not causal or (v.region_size and v.mode != "strict")]))
    return replace(
        levels,
        window=draw(st.sampled_from([1, 3, 5, 9])),
        num_global_tokens=draw(st.integers(3, 7)),
        region_size=None if levels.region_size is None else draw(st.integers(1, 7)),
        selection_chunk=draw(st.none() | st.integers(1, 7)),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_padding_on_either_side_changes_nothing(impl: Impl, data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    levels = data.draw(some_levels(causal=causal))
    left, right = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 6))
    seed = data.draw(st.integers(0, 99))
    bare = inputs(Case(name="bare", levels=levels, tokens=13, is_causal=causal), seed=seed)
    tokens = left + 13 + right
    padded = inputs(Case(name="padded", levels=levels, tokens=tokens, is_causal=causal), seed=seed + 1)
    real = slice(left, left + 13)
    for name, value in bare.items():
        if isinstance(value, Tensor) and name != "pool_weight":
            padded[name][(slice(None),) * TOKEN_AXIS.get(name, 1) + (real,)] = value
    padded["pool_weight"] = bare["pool_weight"]
    padded["padding_mask"] = torch.ones(2, tokens, dtype=torch.bool)
    padded["padding_mask"][:, real] = False
    out, lse = attend(padded, impl)
    assert_equal((out[:, :, real], lse[:, :, real]), attend(bare, impl))
    outside = padded["padding_mask"][0]
    assert not out[:, :, outside].any()
    assert (lse[:, :, outside] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["right", "scattered"])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_stands_in_padding_changes_not_a_bit(impl: Impl, name: str, kind: str) -> None:
    arguments = inputs(Case(name=name, levels=LEVELS[name], padding=kind))
    noisy = clone(arguments)
    other = inputs(Case(name=name, levels=LEVELS[name], padding=kind), seed=8)
    mask = arguments["padding_mask"]
    for key in VECTORS:
        if key in noisy:
            place = (
                mask[:, None, :, None] if noisy[key].ndim == 4 else mask[..., None] if noisy[key].ndim == 3 else mask
            )
            noisy[key] = torch.where(place, 100 * other[key], noisy[key])
    noisy["global_forced"] = noisy["global_forced"] ^ mask
    for found, wanted in zip(attend(noisy, impl), attend(arguments, impl), strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_packed_segments_equal_separate_calls(impl: Impl, data: st.DataObject) -> None:
    causal = data.draw(st.booleans())
    levels = data.draw(some_levels(causal=causal))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    gap = data.draw(st.integers(0, 3))
    ids = [n for n, length in enumerate(lengths) for _ in range(length + gap)]
    case = Case(name="packed", levels=levels, tokens=len(ids), is_causal=causal, padding=None)
    arguments = inputs(case, seed=data.draw(st.integers(0, 99)))
    arguments.pop("global_forced")
    packed = {**arguments, "segment_ids": torch.tensor(ids).expand(2, -1), "num_segments": len(lengths) + 1}
    if gap:
        real = [place < length for length in lengths for place in range(length + gap)]
        packed["padding_mask"] = ~torch.tensor(real).expand(2, -1)
    out, lse = attend(packed, impl)
    start = 0
    for length in lengths:
        index = torch.arange(start, start + length)
        assert_equal((out[:, :, index], lse[:, :, index]), attend(take(arguments, index), impl))
        start += length + gap


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [c for c in CASES if c.padding or c.segments], ids=str)
def test_a_row_does_not_depend_on_its_batch(case: Case, impl: Impl) -> None:
    arguments = inputs(replace(case, batch=2))
    out, lse = attend(arguments, impl)
    for row in range(2):
        index = torch.tensor([row])
        assert_equal((out[index], lse[index]), attend(take_rows(arguments, index), impl))
    order = torch.tensor([1, 0, 1])
    assert_equal((out[order], lse[order]), attend(take_rows(arguments, order), impl))


CAUSAL = [case for case in CALIBRATED if case.is_causal and case.tokens == 19 and "dense_below" not in case.name]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_the_future_changes_nothing_selection_included(case: Case, impl: Impl) -> None:
    arguments = inputs(case)
    wanted = attend(arguments, impl)
    for now in (0, 4, 11, 17):
        changed = clone(arguments)
        future = inputs(case, seed=now + 100)
        for name in ("query", "key", "value", "global_score", "global_prior"):
            if name in changed:
                after = (slice(None),) * TOKEN_AXIS.get(name, 1) + (slice(now + 1, None),)
                # scores far above all others: a selection that looks ahead takes them
                changed[name][after] = future[name][after] + (50 if "global" in name else 0)
        past = [x[:, :, : now + 1] for x in attend(changed, impl)]
        assert_equal((past[0], past[1]), (wanted[0][:, :, : now + 1], wanted[1][:, :, : now + 1]))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_a_prefix_alone_gives_the_same(case: Case, impl: Impl) -> None:
    arguments = inputs(case)
    out, lse = attend(arguments, impl)
    for length in (1, 5, 13):
        prefix = take(arguments, torch.arange(length))
        assert_equal((out[:, :, :length], lse[:, :, :length]), attend(prefix, impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_later_forced_token_is_used_once_its_chunk_is_complete(impl: Impl) -> None:
    levels = Levels(ratio=LevelRatio(0, 0, 1), window=3, region_size=4, num_global_tokens=1, selection_chunk=5)
    arguments = inputs(Case(name="chunk", levels=levels, tokens=19, is_causal=True, extras=False))
    plain, _ = attend({**arguments, "global_score": torch.zeros(2, 19, dtype=torch.float64)}, impl)
    forced = torch.zeros(2, 19, dtype=torch.bool)
    forced[:, 6] = True
    out, _ = attend({**arguments, "global_forced": forced}, impl)
    changed = (out != plain).any(-1).any(1).any(0)
    # token 6 is in the chunk 5..9: the query at 9 is the first whose past holds all of it
    assert changed.nonzero().flatten().tolist() == list(range(9, 19))


def _clean_and_dirty(case: Case, where: Tensor, visible: Tensor, bad: float, impl: Impl) -> None:
    """Rows `visible` (batch, tokens) and all gradients of a loss on them must not notice `bad` at `where`."""
    results = []
    for value in (0.0, bad):
        arguments = clone(garbage(inputs(case), where, value, VECTORS), requires_grad=True)
        out, lse = attend(arguments, impl)
        seen = visible[:, None].expand_as(lse)
        kept_out, kept_lse = out[seen], lse[seen]
        (kept_out.square().sum() + kept_lse[kept_lse.isfinite()].sum()).backward()
        results.append((kept_out.detach(), kept_lse.detach(), gradients(arguments)))
    (out, lse, clean), (dirty_out, dirty_lse, dirty) = results
    torch.testing.assert_close(dirty_out, out, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(dirty_lse, lse, rtol=TOLERANCE, atol=TOLERANCE)
    for name, gradient in dirty.items():
        assert gradient.isfinite().all(), f"gradient of {name} is not finite"
        torch.testing.assert_close(gradient, clean[name], rtol=1e-10, atol=1e-10)


# the last is finite: sums over what nobody may see would drown in it
BAD = [float("nan"), -float("inf"), 1e100]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["left", "scattered"])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_never_leaks(impl: Impl, name: str, kind: str, bad: float) -> None:
    case = Case(name=name, levels=LEVELS[name], padding=kind)
    where = inputs(case)["padding_mask"]
    _clean_and_dirty(case, where, torch.ones_like(where), bad, impl)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("now", [6, 17])
@pytest.mark.parametrize("name", ["calibrated", "union_gate_sinks"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_future_never_leaks(impl: Impl, name: str, now: int, bad: float) -> None:
    case = Case(name=name, levels=LEVELS[name], is_causal=True, without=("global_forced",))
    where = (torch.arange(19) > now).expand(2, -1)
    _clean_and_dirty(case, where, ~where, bad, impl)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("segment", [0, 1])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_other_segments_never_leak(impl: Impl, name: str, segment: int, is_causal: bool, bad: float) -> None:
    levels = LEVELS[name]
    if is_causal and (levels.mode == "strict" or levels.region_size is None):
        return  # no such function; test_messages holds that it says so
    case = Case(name=name, levels=levels, is_causal=is_causal, segments=((5, 7), (3, 0, 9)), without=("global_forced",))
    where = inputs(case)["segment_ids"] == segment
    _clean_and_dirty(case, where, ~where, bad, impl)


@pytest.mark.parametrize("bad", BAD[:2])
@pytest.mark.parametrize("hidden", ["padding", "future", "segment"])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "auto"])
def test_nothing_leaks_where_the_function_is_dense(impl: Impl, hidden: str, bad: float) -> None:
    case = Case(
        name=hidden,
        levels=replace(BASE, dense_below=20),
        is_causal=hidden == "future",
        padding="right" if hidden == "padding" else None,
        segments=((7, 12), (11, 8)) if hidden == "segment" else None,
        extras=False,
    )
    clean = inputs(case)
    if hidden == "padding":
        where = clean["padding_mask"]
    elif hidden == "future":
        where = (torch.arange(19) > 11).expand(2, -1)
    else:
        where = clean["segment_ids"] == 1
    results = []
    for value in (0.0, bad):
        arguments = clone(garbage(clean, where, value, VECTORS), requires_grad=True)
        out = multi_level_attention(**arguments, impl=impl)[(~where)[:, None].expand(2, 3, 19)]
        out.square().sum().backward()
        results.append((out.detach(), gradients(arguments)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=TOLERANCE, atol=TOLERANCE)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_visible_value_that_is_not_finite_shows(impl: Impl, name: str) -> None:
    arguments = inputs(Case(name="bad", extras=False))
    arguments[name][0, :, 6] = torch.nan
    out, _ = attend(arguments, impl)
    assert not out[0, :, 6].isfinite().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_row_of_padding_gives_zeros(impl: Impl, name: str, is_causal: bool) -> None:
    levels = LEVELS[name]
    if is_causal and (levels.mode == "strict" or levels.region_size is None):
        return  # no such function; test_messages holds that it says so
    case = Case(name=name, levels=levels, is_causal=is_causal, padding="whole_row")
    arguments = clone(inputs(case), requires_grad=True)
    out, lse = attend(arguments, impl)
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    out.square().sum().backward()
    for found in gradients(arguments).values():
        assert found.isfinite().all()
    for key in ("query", "key", "value"):
        assert not arguments[key].grad[0].any()


def test_all_padding_in_every_row() -> None:
    arguments = inputs(Case(name="empty"))
    arguments["padding_mask"] = torch.ones(2, 19, dtype=torch.bool)
    for impl in IMPLEMENTATIONS:
        out, lse = attend(arguments, impl)
        assert not out.any()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_shift_of_all_scores_changes_nothing(impl: Impl, is_causal: bool) -> None:
    arguments = inputs(Case(name="shift", is_causal=is_causal, padding="scattered", segments=((5, 11), (7,))))
    arguments["global_score"] = (4 * arguments["global_score"]).round()
    shifted = {**arguments, "global_score": arguments["global_score"] + 3}
    for found, wanted in zip(attend(shifted, impl), attend(arguments, impl), strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [c for c in CALIBRATED if c.heads == c.kv_heads], ids=str)
def test_shifts_of_keys_and_values_pass_through(case: Case, impl: Impl) -> None:
    # every key moved by a changes every logit of a query by scale * q.a, every value moved by b the average by b
    arguments = inputs(case)
    move_key, move_value = torch.randn(2, case.dim, dtype=torch.float64)
    moved = {**arguments, "key": arguments["key"] + move_key, "value": arguments["value"] + move_value}
    out, lse = attend(arguments, impl)
    moved_out, moved_lse = attend(moved, impl)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    torch.testing.assert_close(moved_lse, lse + scale * (arguments["query"] @ move_key), rtol=1e-11, atol=1e-11)
    wanted = out + move_value * lse.isfinite()[..., None]
    torch.testing.assert_close(moved_out, wanted, rtol=1e-11, atol=1e-11)
