"""Distillation: what a compressed model learns from its teacher besides labels, as values and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.attention.layer import MultiLevelAttention
from trilevel.compression.importance import prunable
from trilevel.compression.layers import QuantizedLinear
from trilevel.errors import ConfigError
from trilevel.model.block import Block
from trilevel.model.encoder import Encoder

_SMALLEST = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """Weights of what is learned from the teacher.

    Args:
        temperature: by which logits of student and teacher are divided.
        teacher_weight: of the divergence from the teacher's answers; the supervised loss has the rest of 1, and all of
            1 goes to the teacher where there are no labels.
        hidden_weight: of the distance of hidden states.
        layers: blocks of the encoder whose outputs are compared, from 0; negative ones count from the end.
        head_weight: of the distance of each head's output, taken through its slice of `out_proj`. Heads are matched by
            their places, so none may have been pruned.
        exit_weight: of the mean loss of the heads behind inner blocks, where there are some: each learns from labels
            and teacher as the model's own head does.
    """

    temperature: float = 2.0
    teacher_weight: float = 0.7
    hidden_weight: float = 1.0
    layers: tuple[int, ...] = (-1,)
    head_weight: float = 0.0
    exit_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check every value."""
        if not self.temperature > 0:
            raise ConfigError(f"DistillConfig: temperature={self.temperature} must be > 0.")
        if not 0 <= self.teacher_weight <= 1:
            raise ConfigError(f"DistillConfig: teacher_weight={self.teacher_weight} must lie in [0, 1].")
        for name in ("hidden_weight", "head_weight", "exit_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"DistillConfig: {name}={getattr(self, name)} must be >= 0.")
        if len(set(self.layers)) != len(self.layers) or (self.hidden_weight > 0 and not self.layers):
            raise ConfigError(
                f"DistillConfig: layers={list(self.layers)} must name one block or more, each once; hidden_weight = 0 "
                "compares none."
            )


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened answers from logits (batch, classes), times the squared temperature.

    The square keeps the size of its gradient independent of the temperature (Hinton et al. 2015, arXiv 1503.02531).
    """
    said = F.log_softmax(student.float() / temperature, dim=-1)
    wanted = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(said, wanted, reduction="batchmean", log_target=True) * temperature**2


def distance(student: Tensor, teacher: Tensor, padding_mask: Tensor | None = None) -> Tensor:
    """Mean squared difference of vectors, as a share of the teacher's mean square.

    Args:
        student: (batch, tokens, dim), or any shape without a mask.
        teacher: of the same shape.
        padding_mask: (batch, tokens), true where nothing is compared.
    """
    student, teacher = student.float(), teacher.float()
    if padding_mask is None:
        return F.mse_loss(student, teacher) / teacher.square().mean().clamp(min=_SMALLEST)
    student, teacher = (torch.where(padding_mask[..., None], 0, x) for x in (student, teacher))
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=_SMALLEST)


def head_distance(
    student: Tensor,
    teacher: Tensor,
    student_map: Tensor,
    teacher_map: Tensor,
    num_heads: int,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Squared difference of what each head adds to its block, summed over heads, as a share of the teacher's.

    A head adds its output times its columns of the output map.

    Args:
        student: outputs of the heads side by side, (batch, tokens, num_heads * head_dim).
        teacher: likewise; its heads may be of another width.
        student_map: the output map, (dim, num_heads * head_dim).
        teacher_map: likewise.
        num_heads: heads of both.
        padding_mask: (batch, tokens), true where nothing is compared.
    """
    parts = [(x.float().chunk(num_heads, -1), w.float().chunk(num_heads, -1)) for x, w in
             ((student, student_map), (teacher, teacher_map))]  # fmt: skip
    real = 1.0 if padding_mask is None else (~padding_mask)[..., None].float()
    above, below = student.new_zeros((), dtype=torch.float32), student.new_zeros((), dtype=torch.float32)
    for own, own_map, other, other_map in zip(*parts[0], *parts[1], strict=True):
        wanted = F.linear(other, other_map) * real
        above = above + (F.linear(own, own_map) * real - wanted).square().sum()
        below = below + wanted.square().sum()
    return above / below.clamp(min=_SMALLEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a model gives for a batch, as far as others learn from it.

    Attributes:
        logits: (batch, classes); None where the model answers with vectors.
        vectors: (batch, dim), compared by their cosine; None where it answers with logits.
        padding_mask: (batch, tokens) of the encoder's tokens, true at padding; None for none.
        focus: (batch, units), scores that thin a document out; None where nothing does.
        exits: (batch, exits, classes), logits of the heads behind inner blocks; None where there are none.
    """

    logits: Tensor | None = None
    vectors: Tensor | None = None
    padding_mask: Tensor | None = None
    focus: Tensor | None = None
    exits: Tensor | None = None


def outputs_of(logits: Tensor, padding_mask: Tensor | None = None) -> Outputs:
    """Of the logits of all heads, (batch, segments, classes), the model's own last."""
    exits = logits[:, :-1] if logits.shape[1] > 1 else None
    return Outputs(logits=logits[:, -1], exits=exits, padding_mask=padding_mask)


Forward = Callable[[nn.Module, Any], Outputs]
Supervised = Callable[[Outputs, Any], dict[str, Tensor]]
"""Scalars for the log, `loss` among them, from outputs and a batch with labels."""


class Distillation:
    """The objective of `trilevel.training.loop.fit`: labels where there are some, and the teacher.

    `loss` is `(1 - teacher_weight) * supervised + teacher_weight * divergence` (vectors: 1 - cosine in place of the
    divergence), `+ hidden_weight * hidden + head_weight * heads`, each the mean over the blocks compared.

    Args:
        config: weights.
        teacher: the model that teaches; in evaluation mode here, without gradients.
        student: the model that is trained, whose blocks are watched; the objective is called with it, or with what
            Fabric wraps around it.
        forward: runs either on a batch.
        supervised: the loss of labels; None without.
        bfloat16: the teacher runs in bfloat16, as the student under `bf16-mixed`.

    Raises:
        ConfigError: blocks, widths or heads of the two cannot be compared.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: nn.Module,
        student: nn.Module,
        forward: Forward,
        supervised: Supervised | None,
        *,
        bfloat16: bool = False,
    ) -> None:
        self.config, self.forward, self.supervised, self.bfloat16 = config, forward, supervised, bfloat16
        self.teacher = teacher.eval()
        self.pairs = _pairs(student, teacher)
        self.layers = _compared(config, self.pairs)

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The losses of a batch by name."""
        config = self.config
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16), ExitStack() as stack:
            wanted = stack.enter_context(self._watched([theirs for _, theirs in self.pairs]))
            theirs = self.forward(self.teacher, batch)
        with self._watched([own for own, _ in self.pairs]) as found:
            ours = self.forward(model, batch)
        total, parts = self._answers(ours, theirs, batch)
        if ours.exits is not None and config.exit_weight > 0:
            each = [self._answers(replace(ours, logits=logits), theirs, batch)[0] for logits in ours.exits.unbind(1)]
            parts["exits"] = torch.stack(each).mean()
            total = total + config.exit_weight * parts["exits"]
        if config.hidden_weight > 0:
            distances = [
                distance(own, other, ours.padding_mask) for own, other in zip(found[0], wanted[0], strict=True)
            ]
            parts["hidden"] = torch.stack(distances).mean()
            total = total + config.hidden_weight * parts["hidden"]
        if config.head_weight > 0:
            parts["heads"] = self._heads(found[1], wanted[1], ours.padding_mask)
            total = total + config.head_weight * parts["heads"]
        return {"loss": total, **parts}

    def _answers(self, ours: Outputs, theirs: Outputs, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of what the model answers, and its parts."""
        weight = self.config.teacher_weight
        if ours.logits is not None and theirs.logits is not None:
            parts = {"divergence": divergence(ours.logits, theirs.logits, self.config.temperature)}
        else:
            assert ours.vectors is not None
            assert theirs.vectors is not None
            similarity = F.cosine_similarity(ours.vectors.float(), theirs.vectors.float(), dim=-1)
            parts = {"embedding": 1 - similarity.mean()}
        (total,) = parts.values()
        if self.supervised is None:
            return total, parts
        labelled = self.supervised(ours, batch)
        return weight * total + (1 - weight) * labelled.pop("loss"), parts | labelled

    def _heads(self, found: Sequence[Tensor], wanted: Sequence[Tensor], padding_mask: Tensor | None) -> Tensor:
        distances = []
        for (own, other), x, y in zip(self.pairs, found, wanted, strict=True):
            maps = (_output_map(own.attention), _output_map(other.attention).detach())
            distances.append(head_distance(x, y, *maps, own.attention.num_heads, padding_mask))
        return torch.stack(distances).mean()

    @contextmanager
    def _watched(self, blocks: Sequence[Block]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Collects the outputs of the compared blocks and what their heads give, in order."""
        hidden: list[Tensor] = []
        heads: list[Tensor] = []
        handles = []
        if self.config.hidden_weight > 0:
            handles += [blocks[place].register_forward_hook(lambda *given: hidden.append(given[2]))
                        for place in self.layers]  # fmt: skip
        if self.config.head_weight > 0:
            handles += [
                block.attention.out_proj.register_forward_pre_hook(lambda _, given: heads.append(given[0]))
                for block in blocks
            ]
        try:
            yield hidden, heads
        finally:
            for handle in handles:
                handle.remove()


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of the encoders in a model, pruned and quantized or not, in order."""
    stacks = [part.stack if isinstance(part, Encoder) else part for part in prunable(model).values()]
    return [block for stack in stacks for block in stack.blocks if isinstance(block, Block)]


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[Block, Block]]:
    ours, theirs = blocks_of(student), blocks_of(teacher)
    if len(ours) != len(theirs):
        raise ConfigError(
            f"the teacher has {len(theirs)} blocks and the student {len(ours)}, so none can be compared with its own; "
            "choose a teacher with as many."
        )
    return list(zip(ours, theirs, strict=True))


def _compared(config: DistillConfig, pairs: Sequence[tuple[Block, Block]]) -> tuple[int, ...]:
    if config.hidden_weight > 0:
        for place in config.layers:
            if not -len(pairs) <= place < len(pairs):
                raise ConfigError(f"layers={list(config.layers)}: the model has {len(pairs)} blocks, no block {place}.")
    for number, (own, other) in enumerate(pairs):
        layer, theirs = own.attention, other.attention
        if (config.hidden_weight > 0 or config.head_weight > 0) and layer.embed_dim != theirs.embed_dim:
            raise ConfigError(
                f"block {number} is {layer.embed_dim} wide and the teacher's {theirs.embed_dim}, so hidden states and "
                "heads cannot be compared; set hidden_weight = 0 and head_weight = 0, or choose a teacher as wide."
            )
        if config.head_weight > 0 and layer.num_heads != theirs.num_heads:
            raise ConfigError(
                f"block {number} has {layer.num_heads} heads and the teacher's {theirs.num_heads}: heads are matched "
                "by their places, and pruning moved them. Set head_weight = 0, or keep_heads = 1."
            )
    # in the order in which the blocks run, so that both sides collect alike
    return tuple(sorted(place % len(pairs) for place in config.layers)) if config.hidden_weight > 0 else ()


def _output_map(layer: MultiLevelAttention) -> Tensor:
    part = layer.out_proj
    return part.rounded_weight() if isinstance(part, QuantizedLinear) else part.weight
