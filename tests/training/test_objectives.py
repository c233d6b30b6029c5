from __future__ import annotations

import math

import pytest
import torch

from trilevel.errors import ShapeError
from trilevel.training.objectives import sequence_loss, token_loss, unit_score_loss

BATCH, UNITS, CLASSES = 3, 7, 5


def test_unit_score_loss_is_that_of_a_loop() -> None:
    scores, labels = torch.randn(BATCH, UNITS), torch.rand(BATCH, UNITS)
    mask = torch.rand(BATCH, UNITS) < 0.6
    losses = [
        -(2.5 * y * math.log(1 / (1 + math.exp(-s))) + (1 - y) * math.log(1 - 1 / (1 + math.exp(-s))))
        for s, y in zip(scores[mask].tolist(), labels[mask].tolist(), strict=True)
    ]
    found = unit_score_loss(scores, labels, mask, positive_weight=2.5)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_masked_units_have_no_loss_and_no_gradient() -> None:
    scores = torch.tensor([[0.3, -math.inf, math.nan, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False, False, False]])
    loss = unit_score_loss(scores, torch.ones(1, 4), mask)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad[0, 1:].eq(0).all()
    assert scores.grad[0, 0] < 0
    assert unit_score_loss(scores, torch.ones(1, 4), torch.zeros_like(mask)).item() == 0


def test_token_loss_reads_where_the_mask_is_true() -> None:
    logits, labels = torch.randn(BATCH, UNITS, CLASSES), torch.randint(0, CLASSES, (BATCH, UNITS))
    mask = torch.rand(BATCH, UNITS) < 0.6
    wanted = torch.nn.functional.cross_entropy(logits[mask], labels[mask])
    spoilt = logits.masked_fill(~mask[..., None], math.nan).requires_grad_()
    # a label outside the classes, as padding has, is not read either
    found = token_loss(spoilt, labels.masked_fill(~mask, -100), mask)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert spoilt.grad is not None
    assert spoilt.grad.isfinite().all()
    assert token_loss(logits, labels, torch.zeros_like(mask)).item() == 0
    torch.testing.assert_close(token_loss(logits, labels), token_loss(logits, labels, torch.ones_like(mask)))


def test_losses_are_computed_in_float32() -> None:
    logits, labels = torch.randn(BATCH, CLASSES).bfloat16(), torch.tensor([1, 0, 4])
    assert sequence_loss(logits, labels).dtype == torch.float32
    assert sequence_loss(logits, labels, label_smoothing=0.1) > 0
    assert unit_score_loss(logits, torch.ones(BATCH, CLASSES), torch.ones(BATCH, CLASSES)).dtype == torch.float32


def test_messages() -> None:
    with pytest.raises(ShapeError, match=r"scores \(3, 7\), labels \(3, 6\) and mask \(3, 7\) must all be"):
        unit_score_loss(torch.zeros(3, 7), torch.zeros(3, 6), torch.ones(3, 7))
    with pytest.raises(ShapeError, match=r"logits \(3, 7, 5\) need labels and mask of shape \(3, 7\), got \(3, 6\)"):
        token_loss(torch.zeros(3, 7, 5), torch.zeros(3, 6))
