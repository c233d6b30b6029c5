"""Distillation: each loss against its formula, the objective, gradients, what cannot be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compression.models import BATCH, DIM, LAYERS, TOKENS, encoder, tokens
from trilevel.compression.distill import (
    Distillation,
    DistillConfig,
    Outputs,
    blocks_of,
    distance,
    divergence,
    head_distance,
)
from trilevel.compression.keep import Kept
from trilevel.compression.layers import QuantizedLinear
from trilevel.compression.prune import PruneConfig, prune
from trilevel.compression.quantize import QuantizeConfig, quantize
from trilevel.compression.shrink import prune_encoder
from trilevel.errors import ConfigError

CLASSES = 5
PADDING = torch.arange(TOKENS) >= torch.tensor([[TOKENS], [11], [3]])


class Classifier(nn.Module):
    """An encoder and the mean of its tokens, by a map that is fixed."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.encoder = encoder(**changes)
        self.head = nn.Linear(DIM, CLASSES).double()

    def forward(self, ids: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.encoder(ids, padding_mask=padding_mask).mean(1))
        return logits


def answers(model: nn.Module, batch: dict[str, Tensor]) -> Outputs:
    return Outputs(logits=model(batch["ids"], batch["padding"]), padding_mask=batch["padding"])


def vectors(model: nn.Module, batch: dict[str, Tensor]) -> Outputs:
    return Outputs(vectors=model(batch["ids"]))


def labelled(outputs: Outputs, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    assert outputs.logits is not None
    loss = nn.functional.cross_entropy(outputs.logits, batch["labels"])
    return {"loss": loss, "cross_entropy": loss}


def batch_of() -> dict[str, Tensor]:
    return {"ids": tokens(), "padding": PADDING, "labels": torch.tensor([0, 3, 1])}


def pair(**changes: Any) -> tuple[Classifier, Classifier]:
    student, teacher = Classifier(**changes), Classifier(**changes)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student, teacher


# definition


def test_divergence_is_that_of_softened_answers() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    said, wanted = torch.softmax(student / 2.5, -1), torch.softmax(teacher / 2.5, -1)
    total = sum(float(w * (math.log(w) - math.log(s))) for w, s in zip(wanted.flatten(), said.flatten(), strict=True))
    assert float(divergence(student, teacher, 2.5)) == pytest.approx(2.5**2 * total / 3, rel=1e-4)


def test_distance_is_a_share_of_the_teachers_square_and_padding_counts_nowhere() -> None:
    student, teacher = torch.randn(BATCH, TOKENS, 7), torch.randn(BATCH, TOKENS, 7)
    above = below = 0.0
    for row in range(BATCH):
        for token in range(TOKENS):
            if not PADDING[row, token]:
                above += float((student[row, token] - teacher[row, token]).square().sum())
                below += float(teacher[row, token].square().sum())
    assert float(distance(student, teacher, PADDING)) == pytest.approx(above / below, rel=1e-5)
    none = torch.zeros_like(PADDING)
    torch.testing.assert_close(distance(student, teacher), distance(student, teacher, none))
    student[PADDING] = torch.nan
    assert float(distance(student, teacher, PADDING)) == pytest.approx(above / below, rel=1e-5)


def test_heads_are_compared_through_their_columns_of_the_map() -> None:
    heads, ours, theirs, dim = 3, 5, 7, 11
    student, teacher = torch.randn(BATCH, TOKENS, heads * ours), torch.randn(BATCH, TOKENS, heads * theirs)
    student_map, teacher_map = torch.randn(dim, heads * ours), torch.randn(dim, heads * theirs)
    above = below = 0.0
    for row in range(BATCH):
        for token in range(TOKENS):
            for head in range(heads):
                own, other = slice(head * ours, (head + 1) * ours), slice(head * theirs, (head + 1) * theirs)
                given = student_map[:, own] @ student[row, token, own]
                wanted = teacher_map[:, other] @ teacher[row, token, other]
                above += float((given - wanted).square().sum()) * (not PADDING[row, token])
                below += float(wanted.square().sum()) * (not PADDING[row, token])
    found = head_distance(student, teacher, student_map, teacher_map, heads, PADDING)
    assert float(found) == pytest.approx(above / below, rel=1e-4)


def test_the_objective_is_the_weighted_sum_of_its_parts() -> None:
    student, teacher = pair()
    config = DistillConfig(temperature=3.0, teacher_weight=0.6, hidden_weight=0.5, layers=(0, -1), head_weight=0.25)
    batch = batch_of()
    found = Distillation(config, teacher, student, answers, labelled)(student, batch)
    assert list(found) == ["loss", "divergence", "cross_entropy", "hidden", "heads"]
    wanted = 0.6 * found["divergence"] + 0.4 * found["cross_entropy"] + 0.5 * found["hidden"] + 0.25 * found["heads"]
    torch.testing.assert_close(found["loss"], wanted)
    logits = [model(batch["ids"], PADDING) for model in (student, teacher)]
    torch.testing.assert_close(found["divergence"], divergence(logits[0], logits[1], 3.0))
    # the outputs of both blocks, run by hand
    distances = []
    states = [model.encoder.embedding(batch["ids"]) for model in (student, teacher)]
    for place in range(LAYERS):
        blocks = [model.encoder.stack.blocks[place] for model in (student, teacher)]
        states = [block(state, padding_mask=PADDING) for block, state in zip(blocks, states, strict=True)]
        distances.append(distance(states[0], states[1], PADDING))
    torch.testing.assert_close(found["hidden"], torch.stack(distances).mean())


def test_without_labels_vectors_are_compared_by_their_angle() -> None:
    student, teacher = pair()
    config = DistillConfig(hidden_weight=0.0, layers=())
    found = Distillation(config, teacher, student, vectors, None)(student, batch_of())
    ours, theirs = (model(batch_of()["ids"]) for model in (student, teacher))
    cosine = (ours * theirs).sum(-1) / ours.norm(dim=-1) / theirs.norm(dim=-1)
    assert found["loss"].item() == pytest.approx(1 - cosine.mean().item(), rel=1e-4)
    assert list(found) == ["loss", "embedding"]


# limits, gradients


def test_a_teacher_that_says_the_same_teaches_nothing() -> None:
    _, teacher = pair()
    config = DistillConfig(teacher_weight=1.0, layers=(1, 0), head_weight=1.0)
    found = Distillation(config, teacher, teacher, answers, None)(teacher, batch_of())
    assert found["loss"].item() == pytest.approx(0.0, abs=1e-6)


def test_gradients_reach_the_student_alone_and_no_hook_stays() -> None:
    student, teacher = pair()
    objective = Distillation(DistillConfig(head_weight=1.0), teacher.train(), student, answers, labelled)
    assert not teacher.training
    objective(student, batch_of())["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(block.attention.out_proj.weight.grad is not None for block in blocks_of(student))
    hooks = [
        len(part._forward_hooks) + len(part._forward_pre_hooks) for part in (*student.modules(), *teacher.modules())
    ]
    assert not any(hooks)


def test_a_quantized_student_is_compared_by_what_it_computes() -> None:
    _, teacher = pair()
    rounded = quantize(teacher, QuantizeConfig(smooth=None), [batch_of()], answers)
    config = DistillConfig(teacher_weight=0.0, hidden_weight=0.0, head_weight=1.0)
    found = Distillation(config, teacher, rounded, answers, None)(rounded, batch_of())
    assert 0 < found["heads"].item() < 1e-2
    # by the rounded map, not its float master
    seen: list[Tensor] = []
    layers = [[block.attention for block in blocks_of(model)] for model in (rounded, teacher)]
    for layer in (*layers[0], *layers[1]):
        layer.out_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for model in (rounded, teacher):
        answers(model, batch_of())
    distances = []
    for place, (own, other) in enumerate(zip(*layers, strict=True)):
        assert isinstance(own.out_proj, QuantizedLinear)
        maps = (own.out_proj.rounded_weight(), other.out_proj.weight)
        distances.append(head_distance(seen[place], seen[LAYERS + place], *maps, own.num_heads, PADDING))
    torch.testing.assert_close(found["heads"], torch.stack(distances).mean(), rtol=1e-6, atol=0)
    found["heads"].backward()
    assert blocks_of(rounded)[0].attention.out_proj.weight.grad is not None


def test_a_student_with_fewer_channels_has_its_heads_compared() -> None:
    _, teacher = pair()
    smaller, _ = prune(teacher, PruneConfig(keep_heads=1.0, keep_ffn=0.5, multiple=1, criterion="magnitude"))
    config = DistillConfig(head_weight=1.0)
    assert Distillation(config, teacher, smaller, answers, None)(smaller, batch_of())["heads"].item() > 0


# messages


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"teacher_weight": 1.5}, r"teacher_weight=1.5 must lie in \[0, 1\]"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must be >= 0"),
        ({"head_weight": math.nan}, "head_weight=nan must be >= 0"),
        ({"layers": ()}, "must name one block or more"),
        ({"layers": (1, 1)}, "each once"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DistillConfig(**values)


def test_heads_that_were_pruned_are_not_matched() -> None:
    _, teacher = pair()
    groups = ((0, 1, 3, 5), (0, 1, 2, 3, 4, 5))
    smaller = Classifier()
    smaller.encoder = prune_encoder(teacher.encoder, Kept(groups=groups, channels=(tuple(range(13)),) * 2))
    Distillation(DistillConfig(), teacher, smaller, answers, None)(smaller, batch_of())
    with pytest.raises(ConfigError, match=r"block 0 has 4 heads and the teacher's 6: .* Set head_weight = 0"):
        Distillation(DistillConfig(head_weight=1.0), teacher, smaller, answers, None)


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        ({"num_layers": 3}, {}, "the teacher has 3 blocks and the student 2"),
        ({"dim": DIM + 2}, {}, f"block 0 is {DIM} wide and the teacher's {DIM + 2}"),
        ({}, {"layers": (2,)}, r"layers=\[2\]: the model has 2 blocks, no block 2"),
    ],
)
def test_what_cannot_be_compared(changes: dict[str, Any], config: dict[str, Any], words: str) -> None:
    student, teacher = Classifier(), Classifier()
    teacher.encoder = encoder(**changes)
    with pytest.raises(ConfigError, match=words):
        Distillation(DistillConfig(**config), teacher, student, answers, None)
