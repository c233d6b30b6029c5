from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError, ShapeError
from trilevel.model.config import LayerLevels
from trilevel.model.focus import Compact, Focus, UnitScorer, pass_gradient, tokens_of, top_units
from trilevel.model.stack import BlockStack

DIM, TOKENS, LAYERS, UNITS = 24, 31, 3, 7
LEVELS = Levels(ratio=LevelRatio(2, 1, 1), window=5, region_size=5, num_global_tokens=3)
FOCUS = Focus(after_layer=1, fraction=0.4)


def sharpened(levels: LayerLevels = LEVELS, focus: Focus | None = FOCUS, **options: Any) -> BlockStack:
    stack = BlockStack(DIM, 4, LAYERS, levels, focus=focus, **options).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return stack


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    # sentences of different lengths; the third token and the last belong to none
    unit_ids = torch.tensor(
        [0, 0, -1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, -1]
    )
    return torch.randn(batch, TOKENS, DIM), unit_ids.expand(batch, -1)


# definition


def test_focus_is_the_loop_written_out() -> None:
    stack = sharpened(None, rope_theta=None)
    x, unit_ids = inputs()
    details = stack(x, unit_ids=unit_ids, return_details=True)
    assert stack.unit_scorer is not None
    for row in range(len(x)):
        state = stack.blocks[0](x[row : row + 1])
        token_scores = stack.unit_scorer.score(stack.unit_scorer.norm(state)).flatten()
        scores = torch.stack([token_scores[unit_ids[row] == unit].mean() for unit in range(UNITS)])
        kept = sorted(scores.argsort(descending=True)[:3].tolist())
        inside = torch.tensor([int(unit) in kept for unit in unit_ids[row]])
        deep = state[:, inside]
        for part in stack.blocks[1:]:
            deep = part(deep)
        wanted = state.clone()
        wanted[:, inside] = deep
        torch.testing.assert_close(details.unit_scores[row], scores)
        assert details.kept_units[row].nonzero().flatten().tolist() == kept
        assert [t for t in details.kept_tokens[row].tolist() if t >= 0] == inside.nonzero().flatten().tolist()
        torch.testing.assert_close(details.hidden[row : row + 1], stack.final_norm(wanted))


# limits


@pytest.mark.parametrize("levels", [None, LEVELS])
def test_fraction_one_is_the_model_without_focus(levels: LayerLevels) -> None:
    stack = sharpened(levels)
    x, unit_ids = inputs()
    plain = BlockStack(DIM, 4, LAYERS, levels).eval()
    plain.load_state_dict({n: t for n, t in stack.state_dict().items() if "unit_scorer" not in n})
    details = stack(x, unit_ids=unit_ids, focus_fraction=1.0, return_details=True)
    torch.testing.assert_close(details.hidden, plain(x), rtol=0, atol=0)
    assert details.kept_units is None
    assert details.unit_scores.shape == (2, UNITS)
    with torch.no_grad():
        # without gradients and details the scorer is not run, so no units are needed
        torch.testing.assert_close(stack(x, focus_fraction=1.0), plain(x), rtol=0, atol=0)


def test_rows_without_units_stay_shallow() -> None:
    stack = sharpened()
    x, unit_ids = inputs()
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1] = True
    details = stack(x, unit_ids=unit_ids, padding_mask=padding, return_details=True)
    assert details.kept_units.sum(dim=1).tolist() == [3, 0]
    nowhere = stack(x, unit_ids=torch.full_like(unit_ids, -1), return_details=True)
    torch.testing.assert_close(nowhere.hidden, stack.final_norm(stack.blocks[0](x)))


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 1_000))
def test_number_of_units_kept(units: int, fraction: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (3, units), generator=generator).float()
    scores[1, units // 2 :] = -torch.inf
    kept = top_units(scores, fraction)
    for row in range(3):
        exists = int((scores[row] > -torch.inf).sum())
        number = int(kept[row].sum())
        assert number == min(exists, max(min(1, exists), number))
        assert fraction * exists - 1e-6 <= number < fraction * exists + 1
        if number:
            # nothing left out is better; equals go by position
            worst = scores[row][kept[row]].min()
            left = (scores[row] > -torch.inf) & ~kept[row]
            assert not (scores[row][left] > worst).any()
            ties = (scores[row] == worst).nonzero().flatten()
            chosen = kept[row][ties]
            assert chosen.tolist() == sorted(chosen.tolist(), reverse=True)


def test_fractions_are_not_rounded_up_by_binary_noise() -> None:
    assert top_units(torch.zeros(1, 35), 0.2).sum() == 7
    assert top_units(torch.zeros(1, 30), 0.1).sum() == 3


# invariants


def test_a_row_does_not_depend_on_the_others() -> None:
    stack = sharpened()
    x, unit_ids = inputs(3)
    unit_ids = unit_ids.clone()
    unit_ids[1] = torch.arange(TOKENS) // 5
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [TOKENS], [13]])
    together = stack(x, unit_ids=unit_ids, padding_mask=padding, return_details=True)
    for row in range(3):
        end = int((~padding[row]).sum())
        alone = stack(x[row : row + 1, :end], unit_ids=unit_ids[row : row + 1, :end], return_details=True)
        torch.testing.assert_close(together.hidden[row : row + 1, :end], alone.hidden, rtol=1e-4, atol=1e-4)
        units = alone.kept_units.shape[1]
        assert together.kept_units[row, :units].tolist() == alone.kept_units[0].tolist()


def test_padding_never_leaks() -> None:
    stack = sharpened()
    x, unit_ids = inputs()
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [13]])
    clean = stack(x, unit_ids=unit_ids, padding_mask=padding)
    spoilt = stack(x.masked_fill(padding[..., None], torch.nan), unit_ids=unit_ids, padding_mask=padding)
    torch.testing.assert_close(spoilt[~padding], clean[~padding])


def test_rotary_positions_are_those_of_the_whole_text() -> None:
    stack = sharpened(None)
    x, unit_ids = inputs(1)
    details = stack(x, unit_ids=unit_ids, return_details=True)
    index = details.kept_tokens
    state = stack.blocks[0](x)
    deep = state.gather(1, index[..., None].expand(-1, -1, DIM))
    for part in stack.blocks[1:]:
        deep = part(deep, positions=index)
    torch.testing.assert_close(details.hidden[0, index[0]], stack.final_norm(deep)[0])


def test_packed_segments_stay_apart() -> None:
    stack = sharpened()
    x, unit_ids = inputs(2)
    segments = (torch.arange(TOKENS) >= 13).long().expand(2, -1)
    # rows keep different numbers of tokens, so the second is padded behind its last segment
    unit_ids = torch.stack([unit_ids[0], torch.arange(TOKENS) // 3])
    before = stack(x, unit_ids=unit_ids, segment_ids=segments, num_segments=2, return_details=True)
    changed = x.clone()
    changed[:, 13:] += 0.001
    after = stack(changed, unit_ids=unit_ids, segment_ids=segments, num_segments=2, return_details=True)
    assert torch.equal(before.kept_units, after.kept_units)
    torch.testing.assert_close(before.hidden[:, :13], after.hidden[:, :13])


def test_deep_blocks_are_really_short() -> None:
    stack = sharpened()
    x, unit_ids = inputs()
    lengths: list[int] = []
    for part in stack.blocks:
        part.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    details = stack(x, unit_ids=unit_ids, return_details=True)
    kept = int((details.kept_tokens >= 0).sum(dim=1).max())
    assert kept < TOKENS
    assert lengths == [TOKENS, kept, kept]


def test_inference_equals_training_forward() -> None:
    stack = sharpened()
    x, unit_ids = inputs()
    whole = stack(x, unit_ids=unit_ids)
    with torch.inference_mode():
        torch.testing.assert_close(stack(x, unit_ids=unit_ids), whole)


def test_priors_and_forced_tokens_follow_their_tokens() -> None:
    stack = sharpened()
    x, unit_ids = inputs()
    forced = torch.zeros(2, TOKENS, dtype=torch.bool)
    forced[:, 9] = True
    details = stack(x, unit_ids=unit_ids, global_forced=forced, global_prior=torch.randn(2, TOKENS), explain=True)
    assert len(details.explanations) == LAYERS
    for row in range(2):
        if 9 in details.kept_tokens[row]:
            place = details.kept_tokens[row].tolist().index(9)
            assert place in details.explanations[-1].global_index[row]


# gradients


def test_scorer_and_shallow_state_get_gradients() -> None:
    stack = sharpened()
    x, unit_ids = inputs()
    stack(x.requires_grad_(), unit_ids=unit_ids).square().sum().backward()
    without = [n for n, p in stack.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # the compact text may be short enough for a window over everything, where dense attention has no levels
    assert not [n for n in without if "blocks.0" in n or "unit_scorer" in n]
    assert stack.unit_scorer is not None
    gradient = stack.unit_scorer.score.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_unit_that_helps_is_scored_higher() -> None:
    torch.manual_seed(1)
    scorer, (x, unit_ids) = UnitScorer(DIM), inputs(1)
    scores = nn.Parameter(scorer(x, unit_ids).detach())
    shallow, helpful = torch.zeros(1, 3, 1), torch.ones(1, 3, 1)
    pass_gradient(helpful, shallow, scores[:, :3]).sub(2).square().sum().backward()
    # more of what the deep blocks did lowers the loss, so a step against the gradient raises the scores
    assert scores.grad is not None
    assert (scores.grad[:, :3] < 0).all()


def test_compact_and_scatter_are_inverse() -> None:
    keep = torch.rand(3, TOKENS) < torch.tensor([[0.5], [0.1], [0.9]])
    keep[1] = False
    x = torch.randn(3, TOKENS, DIM)
    compact = Compact.of(keep)
    torch.testing.assert_close(compact.scatter(compact.gather(x), x), x)
    assert (~compact.padding_mask).sum(dim=1).tolist() == keep.sum(dim=1).tolist()
    unit_ids = torch.zeros(3, TOKENS, dtype=torch.int64)
    assert torch.equal(tokens_of(torch.ones(3, 1, dtype=torch.bool), unit_ids, None), torch.ones_like(keep))


# messages


def test_messages() -> None:
    x, unit_ids = inputs()
    stack = sharpened()
    with pytest.raises(ShapeError, match="the model has a focus and needs unit_ids"):
        stack(x)
    with pytest.raises(ShapeError, match="unit_ids has shape"):
        stack(x, unit_ids=unit_ids[:, 1:])
    with pytest.raises(ConfigError, match=r"focus_fraction=0.0 must lie in \(0, 1\]"):
        stack(x, unit_ids=unit_ids, focus_fraction=0.0)
    with pytest.raises(ConfigError, match=r"focus_fraction=0\.5: the model has no focus"):
        sharpened(focus=None)(x, focus_fraction=0.5)
    with pytest.raises(ConfigError, match="leaves no block"):
        sharpened(focus=dataclasses.replace(FOCUS, after_layer=LAYERS))
