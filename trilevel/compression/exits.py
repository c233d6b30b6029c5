"""Early exits for a trained classifier: heads behind inner blocks, to be trained with the rest."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from trilevel.errors import ConfigError
from trilevel.model.exits import even_exits, exit_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitsConfig:
    """Where the heads stand.

    Args:
        segments: how many segments, as even as can be, with a head behind each; the last has the model's own.
        after: the blocks behind which segments end instead, the last one left out.
        focus: of documents: the share of the tokens that go on behind the first segment.
        layer_dropout: chance of leaving out the last block for a row in training, with less for those before it; see
            `trilevel.training.dropout.layer_dropout`. Decision 0026 says why it is 0.
    """

    segments: int = 3
    after: tuple[int, ...] | None = None
    focus: float | None = None
    layer_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        if self.segments < 2:
            raise ConfigError(f"ExitsConfig: segments={self.segments} must be >= 2; a model without exits is one.")
        if self.focus is not None and not 0 < self.focus < 1:
            raise ConfigError(f"ExitsConfig: focus={self.focus} must lie between 0 and 1, a share of the tokens.")
        if not 0 <= self.layer_dropout < 1:
            raise ConfigError(f"ExitsConfig: layer_dropout={self.layer_dropout} must be >= 0 and < 1, a chance.")

    def places(self, num_layers: int) -> tuple[int, ...]:
        """The blocks behind which segments end, of so many, without the last."""
        return even_exits(num_layers, self.segments) if self.after is None else self.after


def with_exits(model: nn.Module, config: ExitsConfig) -> nn.Module:
    """A copy of a classifier with untrained heads behind inner blocks; all else is as it was.

    Args:
        model: float or pruned, with `labels`, `encoder` and `exits` in its configuration.
        config: where they stand.

    Raises:
        ConfigError: the model is none that can have exits, has some already, or fewer blocks than segments.
    """
    given: Any = getattr(model, "config", None)
    if not hasattr(given, "exits"):
        raise ConfigError(f"{type(model).__name__} cannot have exits; image and text classifiers can.")
    if given.exits:
        raise ConfigError(f"the model has exits behind its blocks {list(given.exits)}; leave out [exits].")
    if config.focus is not None:
        raise ConfigError(f"focus={config.focus} is of summarisers, whose sentences can go on or not; leave it out.")
    after = config.places(given.encoder.num_layers)
    twin: Any = copy.deepcopy(model)
    twin.config = replace(given, exits=after)
    weight = next(twin.parameters())
    twin.exits = exit_heads(given.encoder, after, len(given.labels), given.dropout).to(weight.device, weight.dtype)
    made: nn.Module = twin.train(model.training)
    return made
