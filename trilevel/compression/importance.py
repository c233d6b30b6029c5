"""How much each group of heads and each feed-forward channel of a model matters, by three criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.errors import ConfigError, InputError, ShapeError
from trilevel.model.block import Block
from trilevel.model.encoder import Encoder
from trilevel.model.ffn import FeedForward
from trilevel.model.stack import BlockStack

Criterion = Literal["taylor", "magnitude", "random"]
Loss = Callable[[Any, Any], Tensor]
"""Takes the model and a batch, gives a scalar; with or without labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Scores of a model's blocks, in the order of `prunable_blocks`; only those of one block compare.

    Attributes:
        groups: (num_kv_heads,) float64 for each block: of the KV groups with their query heads, that is of the heads
            where none are grouped.
        channels: (ffn_dim,) float64 for each block.
    """

    groups: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]


def prunable(model: nn.Module) -> dict[str, Encoder | BlockStack]:
    """What pruning makes smaller, by its path in the model: every `Encoder`, or else every `BlockStack`.

    The model itself has the path `""`. Stacks beside an encoder, such as that over the units of a document, are left
    out: no `EncoderConfig` describes them.

    Raises:
        ConfigError: there is neither.
    """
    for kind in (Encoder, BlockStack):
        found = {name: part for name, part in model.named_modules() if isinstance(part, kind)}
        if found:
            return found
    raise ConfigError(f"{type(model).__name__} holds no Encoder and no BlockStack; give a model with one.")


def prunable_blocks(model: nn.Module) -> dict[str, Block]:
    """The blocks of `prunable` parts, by their path in the model.

    Raises:
        ConfigError: there are none, or they are not as trilevel builds them.
    """
    blocks: dict[str, Block] = {}
    for name, part in prunable(model).items():
        path = "stack.blocks" if isinstance(part, Encoder) else "blocks"
        stack = part.stack if isinstance(part, Encoder) else part
        for index, block in enumerate(stack.blocks):
            assert isinstance(block, Block)
            blocks[f"{name}.{path}.{index}".removeprefix(".")] = block
    for name, block in blocks.items():
        _check_plain(name, block)
    return blocks


def _check_plain(name: str, block: Block) -> None:
    layer, ffn = block.attention, block.ffn
    parts: dict[str, tuple[nn.Module, type[nn.Module]]] = {
        "attention": (layer, MultiLevelAttention),
        "ffn": (ffn, FeedForward),
    }
    for child in ("in_proj", "out_proj"):
        parts[f"attention.{child}"] = (getattr(layer, child, layer), nn.Linear)
    for child in ("up", "down"):
        parts[f"ffn.{child}"] = (getattr(ffn, child, ffn), nn.Linear)
    for path, (part, kind) in parts.items():
        if type(part) is not kind:
            raise ConfigError(
                f"{name}.{path} is a {type(part).__name__} and pruning slices a {kind.__name__}; prune first, "
                "quantize or replace modules afterwards."
            )


def taylor(model: nn.Module, batches: Iterable[Any], loss: Loss) -> Importance:
    """How much the loss moves when a group of heads or a channel is scaled, squared and summed over the examples.

    A gate g = 1 stands behind every group (before `out_proj`) and channel (before `down`). The score is the sum over
    examples, the rows of the batches, of `(dL/dg)^2`, where `dL/dg = sum over tokens and features of activation *
    dL/dactivation`: the first-order estimate of the squared change of the loss when the unit is removed (Molchanov et
    al. 2019, arXiv 1906.10771, equation 8 with gates; per example, as the head importance of Michel et al. 2019,
    arXiv 1905.10650, which takes the absolute value). A loss that is a mean over the rows weighs the rows of a smaller
    batch more; give batches of one size.

    The model runs in evaluation mode and is left as it was; gradients reach the gates alone, so weights may be frozen.
    An encoder that a forward pass calls twice sees two examples. Where global tokens are selected with
    `selection_gradient="straight_through"`, that gradient, which stands for another selection, counts as well.

    Args:
        model: a module with `Encoder`s or `BlockStack`s.
        batches: what `loss` takes; 16 to 64 examples rank heads, more rank channels better.
        loss: (model, batch) -> scalar. Without labels: the output projected on directions drawn anew for each batch,
            `(output * torch.randn_like(output)).sum((1, 2)).mean()`; the distance to the model's own output has its
            minimum, so no gradient, there.

    Raises:
        ConfigError: no gradient reaches a block, all are zero, or the model has no block.
        InputError: there are no batches, or the loss is not finite.
        ShapeError: the loss is no scalar.
    """
    blocks = prunable_blocks(model)
    totals = {
        name: (torch.zeros(b.attention.num_kv_heads).double(), torch.zeros(b.ffn.down.in_features).double())
        for name, b in blocks.items()
    }
    num_batches, reached = 0, set[str]()
    with _evaluating(model), torch.enable_grad(), _gated(blocks) as gates:
        for num_batches, batch in enumerate(batches, 1):
            gates.clear()
            value = _checked(loss(model, batch), num_batches)
            slopes = torch.autograd.grad(value, [gate.value for gate in gates], allow_unused=True)
            for gate, slope in zip(gates, slopes, strict=True):
                if slope is not None:
                    reached.add(gate.block)
                    totals[gate.block][gate.part].add_(slope.double().flatten(1).square().sum(0).cpu())
    if not num_batches:
        raise InputError("the importance 'taylor' needs batches and there are none; 16 to 64 examples are good.")
    if lost := [name for name in blocks if name not in reached]:
        raise ConfigError(
            f"the loss has no gradient in {', '.join(lost)}; it must be computed from the model's output, without "
            "torch.no_grad on the way."
        )
    groups, channels = zip(*totals.values(), strict=True)
    if not any(scores.any() for scores in (*groups, *channels)):
        raise ConfigError(
            "every gradient of the loss is zero, as that of the distance to the model's own output; use labels or "
            "project the output on random directions."
        )
    return Importance(groups=groups, channels=channels)


def magnitude(model: nn.Module) -> Importance:
    """The Euclidean norm of the weights that go with a group or channel (as DepGraph's, arXiv 2301.12900).

    A group's are its rows of `in_proj` (queries, keys, values) and columns of `out_proj`; a channel's its row of `up`
    (both rows where it is gated) and its column of `down`. Biases do not count.
    """
    blocks = prunable_blocks(model).values()
    return Importance(
        groups=tuple(_group_norms(block.attention) for block in blocks),
        channels=tuple(_channel_norms(block.ffn) for block in blocks),
    )


def random(model: nn.Module, seed: int) -> Importance:
    """Uniform scores, a function of the seed and the sizes alone: the baseline that a criterion must beat."""
    generator = torch.Generator().manual_seed(seed)
    blocks = prunable_blocks(model).values()
    return Importance(
        groups=tuple(torch.rand(b.attention.num_kv_heads, generator=generator).double() for b in blocks),
        channels=tuple(torch.rand(b.ffn.down.in_features, generator=generator).double() for b in blocks),
    )


def check_criterion(criterion: str) -> None:
    """Raise `ConfigError` unless `criterion` is one of `Criterion`."""
    if criterion not in get_args(Criterion):
        raise ConfigError(f"criterion={criterion!r} is unknown; known are {', '.join(get_args(Criterion))}.")


def _checked(value: Tensor, number: int) -> Tensor:
    if value.ndim:
        raise ShapeError(f"the loss has shape {tuple(value.shape)} and must be a scalar; take its mean.")
    if not value.isfinite():
        raise InputError(f"the loss of batch {number} is {value.item()}; check the batch and the model's weights.")
    if not value.requires_grad:
        raise ConfigError("the loss has no gradient; compute it from the model's output, without torch.no_grad.")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gate:
    # ones (rows, 1, ..., units, 1) behind the units of a block; part 0 is attention, 1 the feed-forward part
    value: Tensor
    block: str
    part: int


@contextmanager
def _gated(blocks: dict[str, Block]) -> Iterator[list[_Gate]]:
    """Collects the gates of a forward pass, which is computed through them."""
    gates: list[_Gate] = []

    def gate(block: str, part: int, units: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        def scale(_module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            x = given[0]
            ones = x.new_ones(len(x), *[1] * (x.ndim - 2), units, 1).requires_grad_()
            gates.append(_Gate(value=ones, block=block, part=part))
            gated: Tensor = x.unflatten(-1, (units, -1)) * ones
            return gated.flatten(-2)

        return scale

    handles = []
    try:
        for name, block in blocks.items():
            down, layer = block.ffn.down, block.attention
            handles.append(layer.out_proj.register_forward_pre_hook(gate(name, 0, layer.num_kv_heads)))
            handles.append(down.register_forward_pre_hook(gate(name, 1, down.in_features)))
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def _group_norms(layer: MultiLevelAttention) -> Tensor:
    groups, dim = layer.num_kv_heads, layer.head_dim
    rows = layer.in_proj.weight.split([layer.num_heads * dim, groups * dim, groups * dim])
    columns = layer.out_proj.weight.T
    return _row_norms([part.reshape(groups, -1) for part in (*rows, columns)])


@torch.no_grad()
def _channel_norms(ffn: FeedForward) -> Tensor:
    rows = ffn.up.weight.chunk(2) if ffn.is_gated else (ffn.up.weight,)
    return _row_norms([*rows, ffn.down.weight.T])


def _row_norms(parts: Sequence[Tensor]) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(torch.cat(list(parts), 1).double(), dim=1)
    return norms.cpu()
