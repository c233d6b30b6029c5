"""The classifier: an encoder, one vector for the text, a linear map to the classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trilevel.conversion.embed import pooled
from trilevel.conversion.sentence import Pooling, Sentence
from trilevel.conversion.sequences import check_text
from trilevel.conversion.source import Source
from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig, from_mapping
from trilevel.model.encoder import Encoder
from trilevel.model.exits import check_exits, exit_heads, run_segments


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierConfig:
    """All that a classifier is, but for its weights.

    Args:
        encoder: of the encoder, levels included.
        labels: names of the classes, in the order of the logits.
        max_tokens: tokens of a text that are read, special ones included.
        pooling: `mean` of the real tokens, or the first one (`cls`).
        padding_id: token that fills rows up.
        dropout: before the linear map.
        head_rate: how many times as fast as the encoder the linear map learns. Adam's steps do not depend on the size
            of a gradient, so a map whose output is multiplied by 10 moves 10 times as far.
        exits: blocks behind which a head of its own answers too, see `run_segments`.
    """

    encoder: EncoderConfig
    labels: tuple[str, ...]
    max_tokens: int
    pooling: Pooling = "mean"
    padding_id: int = 0
    dropout: float = 0.1
    head_rate: float = 10.0
    exits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check every value."""
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"ClassifierConfig: labels={self.labels} must be two or more different names.")
        if not 4 <= self.max_tokens <= self.encoder.max_tokens:
            raise ConfigError(
                f"ClassifierConfig: max_tokens={self.max_tokens} must lie in 4 to {self.encoder.max_tokens}, what the "
                "encoder accepts."
            )
        if self.pooling not in ("mean", "cls"):
            raise ConfigError(f"ClassifierConfig: pooling={self.pooling!r} is neither 'mean' nor 'cls'.")
        if not 0 <= self.dropout < 1 or not self.head_rate > 0:
            raise ConfigError(
                f"ClassifierConfig: dropout={self.dropout} must lie in [0, 1) and head_rate={self.head_rate} be > 0."
            )
        check_exits(self.exits, self.encoder)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types; `from_dict` gives an equal one back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # older runs have none
        exits = {"exits": list(self.exits)} if self.exits else {}
        del values["exits"]
        return {**values, "encoder": self.encoder.to_dict(), "labels": list(self.labels), **exits}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassifierConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        if not isinstance(values.get("encoder"), Mapping) or not isinstance(values.get("labels"), list):
            raise ConfigError("ClassifierConfig: an encoder table and a list of labels are needed.")
        own = {"encoder": EncoderConfig.from_dict(values["encoder"]), "labels": tuple(values["labels"])}
        own["exits"] = tuple(values.get("exits", ()))
        return from_mapping(cls, dict(values) | own)


class Classifier(nn.Module):
    """Token ids to logits of the classes."""

    def __init__(self, config: ClassifierConfig, encoder: Encoder | None = None) -> None:
        """With `encoder` its weights are taken as they are; the linear map starts at zero, all classes equal."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder) if encoder is None else encoder
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.encoder.dim, len(config.labels))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.exits = exit_heads(config.encoder, config.exits, len(config.labels), config.dropout)
        self._sentence = Sentence(pooling=config.pooling)

    def forward(self, input_ids: Tensor, *, padding_mask: Tensor | None = None, return_exits: bool = False) -> Tensor:
        """Map (batch, tokens), padding where `padding_mask` is true, to logits (batch, classes) in float32.

        With `return_exits` to the logits of all heads, (batch, segments, classes), the model's own last.
        """
        if return_exits:
            return run_segments(self, self.embed(input_ids, padding_mask), padding_mask)[1]
        return self.answer(self.encoder(input_ids, padding_mask=padding_mask), padding_mask)

    def embed(self, input_ids: Tensor, padding_mask: Tensor | None) -> Tensor:
        """What the first block reads, (batch, tokens, dim)."""
        return self.encoder.embed(input_ids, padding_mask=padding_mask)

    def answer(self, hidden: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Logits (batch, classes) of the encoder's output."""
        vector = pooled(hidden.float(), padding_mask, self._sentence)
        logits: Tensor = self.head(self.dropout(vector))
        return logits.float() * self.config.head_rate


class Masked(nn.Module):
    """A classifier of ids and a mask, 1 at real tokens, as runtimes pass it."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map two (batch, tokens) to logits (batch, classes)."""
        logits: Tensor = self.classifier(input_ids, padding_mask=attention_mask == 0)
        return logits


def from_source(
    source: Source, labels: tuple[str, ...], *, max_tokens: int | None = None, dropout: float, head_rate: float
) -> Classifier:
    """A classifier on a pretrained or converted encoder; by default it reads as many tokens as that was trained for.

    Raises:
        InputError: the encoder reads images.
        ConfigError: a value is out of range.
    """
    check_text(source)
    config = ClassifierConfig(
        encoder=source.encoder.config,
        labels=labels,
        max_tokens=source.trained_tokens if max_tokens is None else max_tokens,
        pooling=source.sentence.pooling,
        padding_id=source.padding_id or 0,
        dropout=dropout,
        head_rate=head_rate,
    )
    return Classifier(config, source.encoder)
