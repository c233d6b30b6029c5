"""Distillation: batches, what is trained, the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conversion.dense import dense_encoder, ids
from trilevel.attention.levels import Levels
from trilevel.conversion.fit import DistillBatches, Trained, distillation, train_only
from trilevel.conversion.sentence import Sentence
from trilevel.errors import ConfigError
from trilevel.model.encoder import with_levels
from trilevel.training.dropout import without_dropout


def padded(sequences: list[Tensor], padding_id: int) -> dict[str, Tensor]:
    return DistillBatches(sequences=sequences, batch_size=len(sequences), padding_id=padding_id).batch(0)


LEVELS = Levels(window=5, region_size=3, num_global_tokens=4)
SEQUENCES = ids((11, 7, 13, 5, 9))


def test_a_batch_is_a_function_of_its_number_and_an_epoch_sees_everything() -> None:
    batches = DistillBatches(sequences=SEQUENCES, batch_size=5, padding_id=0, seed=3)
    first, again, second = batches.batch(0), batches.batch(0), batches.batch(1)
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], second["input_ids"])
    for batch in (first, second):
        lengths = (~batch["padding_mask"]).sum(1).tolist()
        assert sorted(lengths) == [5, 7, 9, 11, 13]


def test_images_are_stacked_without_padding() -> None:
    images = [torch.full((2, 3, 5), float(number)) for number in range(4)]
    batch = DistillBatches(sequences=images, batch_size=4, padding_id=0).batch(0)
    assert set(batch) == {"input_ids"}
    assert batch["input_ids"].shape == (4, 2, 3, 5)
    assert sorted(batch["input_ids"][:, 1, 2, 4].tolist()) == [0, 1, 2, 3]


def test_a_student_that_is_its_teacher_has_no_loss() -> None:
    teacher, student = dense_encoder(), dense_encoder()
    losses: Any = distillation(teacher, student, Sentence())(student, padded(SEQUENCES, 0))
    assert losses["loss"].item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_cosine_and_relative_distance_at_real_tokens() -> None:
    teacher, student = dense_encoder(0), dense_encoder(1)
    batch = padded(SEQUENCES[:2], 0)
    losses: Any = distillation(teacher, student, Sentence(), hidden_weight=0.5)(student, batch)
    cosines, distances = [], torch.zeros(3)
    squares = torch.zeros(3)
    for sequence in SEQUENCES[:2]:
        x, y = (encoder.embedding(sequence[None]) for encoder in (teacher, student))
        for layer in range(3):
            x, y = teacher.stack.blocks[layer](x), student.stack.blocks[layer](y)
            distances[layer] += (x - y).square().sum().item()
            squares[layer] += x.square().sum().item()
        wanted, given = teacher.stack.final_norm(x).mean(1), student.stack.final_norm(y).mean(1)
        cosines.append(nn.functional.cosine_similarity(wanted, given).item())
    hidden = float((distances / squares).mean())
    assert losses["hidden"].item() == pytest.approx(hidden, rel=1e-5)
    assert losses["embedding"].item() == pytest.approx(1 - sum(cosines) / 2, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(1 - sum(cosines) / 2 + 0.5 * hidden, rel=1e-5)


def test_padding_does_not_count() -> None:
    teacher, student = dense_encoder(0), dense_encoder(1)
    objective = distillation(teacher, student, Sentence())
    short: Any = objective(student, padded([SEQUENCES[1]], 0))
    batch = padded([SEQUENCES[1], SEQUENCES[1]], 0)
    longer = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((2, 6), 17)], 1),
        "padding_mask": torch.cat([batch["padding_mask"], torch.ones(2, 6, dtype=torch.bool)], 1),
    }
    again: Any = objective(student, longer)
    assert again["loss"].item() == pytest.approx(short["loss"].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("which", "trained", "frozen"),
    [
        ("levels", "stack.blocks.0.attention.pool_weight", "stack.blocks.0.attention_norm.weight"),
        ("small", "stack.blocks.0.ffn.up.bias", "stack.blocks.0.ffn.up.weight"),
        ("all", "stack.blocks.0.ffn.up.weight", "embedding.table.weight"),
    ],
)
def test_what_is_trained(which: Trained, trained: str, frozen: str) -> None:
    student = with_levels(dense_encoder(), LEVELS)
    count = train_only(student, which)
    weights = dict(student.named_parameters())
    assert weights[trained].requires_grad
    assert not weights[frozen].requires_grad
    assert weights["stack.blocks.2.attention.scorer.weight"].requires_grad
    assert count == sum(weight.numel() for weight in weights.values() if weight.requires_grad)


def test_the_student_learns_without_noise_and_keeps_its_rates() -> None:
    student = dense_encoder().train()
    with without_dropout(student):
        x = student(SEQUENCES[0][None])
        torch.testing.assert_close(x, student(SEQUENCES[0][None]))
    assert {part.p for part in student.modules() if isinstance(part, nn.Dropout)} == {0.1}


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained='some' is unknown"):
        train_only(dense_encoder(), "some")  # type: ignore[arg-type]
