from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trilevel.errors import ConfigError, ShapeError
from trilevel.model.heads import Pooling, SequenceHead, SpanHead, TokenHead, weighted_by_unit
from trilevel.model.pool import mean_by_unit

BATCH, TOKENS, DIM, UNITS = 3, 17, 5, 7


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    unit_ids = torch.randint(-1, UNITS - 1, (BATCH, TOKENS))
    padding = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [11], [2]])
    return x, unit_ids, padding


def members(unit_ids: Tensor, padding: Tensor, row: int, unit: int) -> Tensor:
    return (unit_ids[row] == unit) & ~padding[row]


def test_mean_is_that_of_a_loop() -> None:
    x, unit_ids, padding = inputs()
    means, counts = mean_by_unit(x, unit_ids, num_units=UNITS, padding_mask=padding)
    for row in range(BATCH):
        for unit in range(UNITS):
            inside = members(unit_ids, padding, row, unit)
            wanted = x[row, inside].mean(dim=0) if inside.any() else torch.zeros(DIM, dtype=x.dtype)
            torch.testing.assert_close(means[row, unit], wanted)
            assert counts[row, unit] == inside.sum()


def test_attention_pooling_is_that_of_a_loop() -> None:
    x, unit_ids, padding = inputs()
    # large logits: without the subtracted maximum they overflow
    logits = 1_000 * torch.randn(BATCH, TOKENS, dtype=x.dtype)
    pooled = weighted_by_unit(x, logits, unit_ids, UNITS, padding)
    for row in range(BATCH):
        for unit in range(UNITS):
            inside = members(unit_ids, padding, row, unit)
            wanted = logits[row, inside].softmax(dim=0) @ x[row, inside]
            torch.testing.assert_close(pooled[row, unit], wanted)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_span_head_starts_as_the_mean(pooling: Pooling) -> None:
    x, unit_ids, padding = inputs()
    units, scores = SpanHead(DIM, pooling=pooling).double()(x, unit_ids, num_units=UNITS, padding_mask=padding)
    torch.testing.assert_close(units, mean_by_unit(x, unit_ids, num_units=UNITS, padding_mask=padding)[0])
    assert scores.shape == (BATCH, UNITS)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_padding_never_leaks_into_units(pooling: Pooling) -> None:
    x, unit_ids, padding = inputs()
    head = SpanHead(DIM, pooling=pooling).double()
    if head.weigh is not None:
        torch.nn.init.normal_(head.weigh.weight)
    clean = head(x, unit_ids, num_units=UNITS, padding_mask=padding)
    spoilt = x.masked_fill((padding | (unit_ids < 0))[..., None], torch.nan).requires_grad_()
    units, scores = head(spoilt, unit_ids, num_units=UNITS, padding_mask=padding)
    torch.testing.assert_close((units, scores), clean)
    (gradient,) = torch.autograd.grad(units.sum() + scores.sum(), spoilt)
    assert gradient[~padding & (unit_ids >= 0)].isfinite().all()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_units_have_a_correct_gradient(pooling: Pooling) -> None:
    x, unit_ids, padding = inputs()
    head = SpanHead(DIM, pooling=pooling).double()
    if head.weigh is not None:
        torch.nn.init.normal_(head.weigh.weight)
    assert torch.autograd.gradcheck(
        lambda values: head(values, unit_ids, num_units=UNITS, padding_mask=padding), x.requires_grad_()
    )


def test_number_of_units_comes_from_the_ids() -> None:
    x, unit_ids, _ = inputs()
    assert mean_by_unit(x, unit_ids)[0].shape == (BATCH, int(unit_ids.max()) + 1, DIM)
    assert mean_by_unit(x, torch.full_like(unit_ids, -1))[0].shape == (BATCH, 1, DIM)
    assert mean_by_unit(x[:, :0], unit_ids[:, :0])[0].shape == (BATCH, 1, DIM)


def test_bfloat16_is_summed_in_float32() -> None:
    x = torch.full((1, 1_009, 1), 1.0, dtype=torch.bfloat16)
    means, _ = mean_by_unit(x, torch.zeros(1, 1_009, dtype=torch.int64))
    assert means.dtype == torch.bfloat16
    assert means.item() == 1.0


def test_sequence_head_reads_real_tokens_only() -> None:
    x, _, padding = inputs()
    head = SequenceHead(DIM, 2).double()
    logits = head(x.masked_fill(padding[..., None], torch.nan), padding_mask=padding)
    for row in range(BATCH):
        torch.testing.assert_close(logits[row : row + 1], head(x[row : row + 1, ~padding[row]]))
    everything = torch.ones_like(padding)
    torch.testing.assert_close(head(x, padding_mask=everything), head.logits.bias.expand(BATCH, -1))


def test_token_head_maps_each_token() -> None:
    assert TokenHead(DIM, 2)(torch.randn(BATCH, TOKENS, DIM)).shape == (BATCH, TOKENS, 2)


def test_messages() -> None:
    x, unit_ids, _ = inputs()
    with pytest.raises(ShapeError, match=r"unit_ids has shape \(3, 16\); \(batch, tokens\) = \(3, 17\) is needed"):
        mean_by_unit(x, unit_ids[:, 1:])
    with pytest.raises(ConfigError, match="pooling='max' is neither"):
        SpanHead(DIM, pooling="max")  # type: ignore[arg-type]
