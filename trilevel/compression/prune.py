"""Structured pruning: a model with fewer heads and feed-forward channels, its matrices really smaller."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from torch import nn

from trilevel.compression.importance import (
    Criterion,
    Importance,
    Loss,
    check_criterion,
    magnitude,
    prunable,
    prunable_blocks,
    random,
    taylor,
)
from trilevel.compression.keep import HeadClass, Kept, Scope, choose, class_groups
from trilevel.compression.shrink import prune_encoder, prune_stack
from trilevel.errors import ConfigError
from trilevel.model.block import Block
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """How much is kept, and by what.

    Args:
        keep_heads: share of the heads (KV groups where heads are grouped) that stay, in (0, 1]; every block keeps one
            of each class of heads at least.
        keep_ffn: share of the feed-forward channels that stay, in (0, 1].
        scope: `global` lets the blocks compete, `layer` takes the same share from each.
        criterion: `taylor` (needs batches and a loss), or the baselines `magnitude` and `random`.
        multiple: of the channels that a block keeps; vector units and INT8 kernels like 16.
        seed: of `random`.
    """

    keep_heads: float = 0.5
    keep_ffn: float = 0.5
    scope: Scope = "global"
    criterion: Criterion = "taylor"
    multiple: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("keep_heads", "keep_ffn"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"PruneConfig: {name}={getattr(self, name)} must lie in (0, 1]; 1.0 keeps all.")
        if self.scope not in get_args(Scope):
            raise ConfigError(f"PruneConfig: scope={self.scope!r} is neither 'global' nor 'layer'.")
        check_criterion(self.criterion)
        if self.multiple < 1:
            raise ConfigError(f"PruneConfig: multiple={self.multiple} must be >= 1; 1 keeps any number of channels.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedLayer:
    """What a block kept.

    Attributes:
        name: the block's path in the model.
        kept_heads: of each class that it has, the query heads that stay, by their numbers before.
        heads_before: how many heads of each class it had.
        channels: feed-forward channels that stay.
        channels_before: how many it had.
    """

    name: str
    kept_heads: dict[HeadClass, tuple[int, ...]]
    heads_before: dict[HeadClass, int]
    channels: int
    channels_before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What pruning did to a model; sizes are those of all its parameters and buffers."""

    config: PruneConfig
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    layers: tuple[PrunedLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        values = dataclasses.asdict(self)
        for layer in values["layers"]:
            layer["kept_heads"] = {name: list(heads) for name, heads in layer["kept_heads"].items()}
        return values | {"layers": list(values["layers"])}


def prune(
    model: Model, config: PruneConfig, batches: Iterable[Any] = (), loss: Loss | None = None
) -> tuple[Model, PruneReport]:
    """A copy of the model with the least important heads and feed-forward channels left out; the model stays whole.

    Every `Encoder` in the model becomes smaller (`prune_encoder`), all of them competing together, and so does its
    configuration where a module's `config` holds it, so that a pruned classifier saves and loads as any other. A model
    without `Encoder` has its `BlockStack`s made smaller; their sizes stand in no configuration. Without training
    afterwards a model pruned by half is a poor one: distil it.

    Args:
        model: a module with `Encoder`s or `BlockStack`s.
        config: how much stays, and by what.
        batches: for `taylor`: what `loss` takes.
        loss: for `taylor`: (model, batch) -> scalar; see `taylor`.

    Raises:
        ConfigError: nothing to prune, `taylor` without a loss, or `multiple` above the channels of a block.
        InputError, ShapeError: as `taylor`.

    >>> from trilevel.model.presets import tiny
    >>> encoder = Encoder(tiny(11, levels=None))
    >>> smaller, report = prune(encoder, PruneConfig(criterion="magnitude", scope="layer"))
    >>> smaller.config.num_heads, smaller.config.head_dim, smaller.config.ffn_dim
    (2, 32, 256)
    """
    blocks = prunable_blocks(model)
    kept = choose(
        list(blocks.values()),
        _importance(model, config, batches, loss),
        keep_heads=config.keep_heads,
        keep_ffn=config.keep_ffn,
        scope=config.scope,
        multiple=config.multiple,
    )
    smaller = _pruned(model, kept)
    before, after = _size(model), _size(smaller)
    report = PruneReport(
        config=config,
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        layers=tuple(
            _layer(name, block, groups, len(channels))
            for (name, block), groups, channels in zip(blocks.items(), kept.groups, kept.channels, strict=True)
        ),
    )
    return smaller, report


def _importance(model: nn.Module, config: PruneConfig, batches: Iterable[Any], loss: Loss | None) -> Importance:
    if config.criterion == "magnitude":
        return magnitude(model)
    if config.criterion == "random":
        return random(model, config.seed)
    if loss is None:
        raise ConfigError("criterion='taylor' needs batches and a loss; give both, or take criterion='magnitude'.")
    return taylor(model, batches, loss)


def _pruned(model: Model, kept: Kept) -> Model:
    twin = copy.deepcopy(model)
    start = 0
    for path, part in prunable(twin).items():
        stack = part.stack if isinstance(part, Encoder) else part
        end = start + len(stack.blocks)
        own = Kept(groups=kept.groups[start:end], channels=kept.channels[start:end])
        start = end
        if isinstance(part, Encoder):
            smaller: nn.Module = prune_encoder(part, own)
            _follow(twin, part, smaller)
        else:
            smaller = prune_stack(part, own)
        if not path:
            return smaller  # type: ignore[return-value]
        _replace(twin, part, smaller)
    return twin


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`."""
    for path, part in list(model.named_modules(remove_duplicate=False)):
        if part is old:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)


def _follow(model: nn.Module, old: Encoder, new: nn.Module) -> None:
    """Let the configurations that hold the old encoder's hold the new one's."""
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if part is old or not dataclasses.is_dataclass(config):
            continue
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        held = [name for name, value in fields.items() if isinstance(value, EncoderConfig) and value == old.config]
        if held:
            part.config = _with(config, dict.fromkeys(held, new.config))


def _with(config: Any, changes: dict[str, Any]) -> Any:
    return dataclasses.replace(config, **changes)


def _size(model: nn.Module) -> tuple[int, int]:
    """Numbers and bytes."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def _layer(name: str, block: Block, groups: tuple[int, ...], channels: int) -> PrunedLayer:
    layer = block.attention
    per_group = layer.num_heads // layer.num_kv_heads
    classes = class_groups(layer)
    return PrunedLayer(
        name=name,
        kept_heads={
            own: tuple(group * per_group + place for group in groups if group in members for place in range(per_group))
            for own, members in classes.items()
        },
        heads_before={own: per_group * len(members) for own, members in classes.items()},
        channels=channels,
        channels_before=block.ffn.down.in_features,
    )
