"""The summariser: tokens of the whole document, then units, then one score for each unit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.applications.documents.backbone import Backbone, UnitInput, unit_vectors
from trilevel.applications.documents.data import DocumentBatch
from trilevel.applications.documents.tokenizer import PADDING_ID
from trilevel.applications.documents.units import FEATURE_SIZES
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig, LayerLevels, from_mapping, head_width, levels_from_json
from trilevel.model.encoder import Encoder, dense_twin
from trilevel.model.focus import Focus
from trilevel.model.pool import mean_by_unit
from trilevel.model.stack import BlockStack, Details
from trilevel.model.weights import copy_shared

TOKEN_LEVELS = Levels(ratio=LevelRatio(6, 3, 1), window=33, region_size=64, num_global_tokens=64)
# a long document has a few hundred units: smaller windows and regions than over tokens
UNIT_LEVELS = Levels(ratio=LevelRatio(6, 3, 1), window=17, region_size=8, num_global_tokens=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentConfig:
    """What a document model is made of.

    Args:
        tokens: the encoder over tokens, trained with the rest, or a frozen pretrained one; width, heads and dropout
            that it names hold for the units as well.
        unit_layers: blocks over the units.
        unit_levels: what their heads see; None is dense attention.
        word_dropout: share of the tokens that training hides.
    """

    tokens: EncoderConfig | Backbone
    unit_layers: int = 2
    unit_levels: LayerLevels = UNIT_LEVELS
    word_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the share; the parts check the rest."""
        if not 0.0 <= self.word_dropout < 1.0:
            raise ConfigError(f"DocumentConfig: word_dropout={self.word_dropout} must lie in [0, 1).")

    def dense(self) -> DocumentConfig:
        """The same sizes with dense attention everywhere; a backbone's levels are its own."""
        return self.with_levels(None, None)

    @property
    def is_dense(self) -> bool:
        """True if no part has levels; a backbone's are not looked at."""
        return (isinstance(self.tokens, Backbone) or self.tokens.levels is None) and self.unit_levels is None

    @property
    def max_tokens(self) -> int:
        """Tokens of a document that can be read, special tokens of a backbone taken off."""
        return self.tokens.max_tokens

    @property
    def focus(self) -> Focus | None:
        """Where the text is thinned out; None if nowhere."""
        return None if isinstance(self.tokens, Backbone) else self.tokens.focus

    @property
    def unit_heads(self) -> int:
        """Heads of the blocks over units: as many of the tokens' size as fill the width, pruned there or not."""
        tokens = self.tokens
        return tokens.num_heads if isinstance(tokens, Backbone) else tokens.dim // head_width(tokens)

    def with_levels(self, token_levels: LayerLevels, unit_levels: LayerLevels) -> DocumentConfig:
        """The same sizes with other levels; those of a backbone stay what they are."""
        tokens = self.tokens
        if isinstance(tokens, EncoderConfig):
            tokens = dataclasses.replace(tokens, levels=token_levels)
        return dataclasses.replace(self, tokens=tokens, unit_levels=unit_levels)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types."""
        tokens = self.tokens
        units = EncoderConfig(
            vocab_size=1,
            dim=tokens.dim,
            num_heads=self.unit_heads,
            num_layers=self.unit_layers,
            levels=self.unit_levels,
        )
        values = {
            "unit_layers": self.unit_layers,
            "unit_levels": units.to_dict()["levels"],
            "word_dropout": self.word_dropout,
        }
        if isinstance(tokens, Backbone):
            return {"backbone": json.loads(json.dumps(dataclasses.asdict(tokens))), **values}
        return {"tokens": tokens.to_dict(), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DocumentConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        values = dict(values)
        if "backbone" in values:
            values["tokens"] = Backbone.from_dict(values.pop("backbone"))
        if "tokens" in values and isinstance(values["tokens"], Mapping):
            values["tokens"] = EncoderConfig.from_dict(values["tokens"])
        if "unit_levels" in values:
            values["unit_levels"] = levels_from_json(values["unit_levels"])
        return from_mapping(cls, values)


def default_config(
    vocab_size: int, *, num_layers: int = 2, dropout: float = 0.2, word_dropout: float = 0.2
) -> DocumentConfig:
    """The shipped model's sizes: width 128, four heads of 32, focus after the first block."""
    tokens = EncoderConfig(
        vocab_size=vocab_size,
        dim=128,
        num_heads=4,
        num_layers=num_layers,
        levels=TOKEN_LEVELS,
        dropout=dropout,
        padding_id=PADDING_ID,
        focus=Focus(after_layer=1, fraction=0.2),
    )
    return DocumentConfig(tokens=tokens, unit_layers=2, unit_levels=UNIT_LEVELS, word_dropout=word_dropout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a forward pass gives.

    `scores` (batch, units), and the details of the encoder (None for a backbone) and of the unit blocks.
    """

    scores: Tensor
    tokens: Details | None
    units: Details


class DocumentModel(nn.Module):
    """Scores of a document's units.

    Tokens of the whole document pass the encoder; the mean of each unit's tokens, plus embeddings of its features,
    passes the blocks over units; a linear map scores. Titles, headings and lead sentences have a prior as global tokens
    and as global units.

    With a `Backbone` the encoder is a pretrained one that is never trained and no part of what is saved: give it with
    `attach`, or give `unit_vectors` in the batches.

    >>> model = DocumentModel(default_config(vocab_size=101))
    >>> model.dense().config.is_dense
    True
    """

    def __init__(self, config: DocumentConfig) -> None:
        super().__init__()
        self.config = config
        tokens = config.tokens
        self.encoder = Encoder(tokens) if isinstance(tokens, EncoderConfig) else None
        self.unit_input = UnitInput(tokens) if isinstance(tokens, Backbone) else None
        tables = [nn.Embedding(size, tokens.dim) for size in FEATURE_SIZES]
        self.features = nn.ModuleList(tables)
        self.unit_norm = nn.LayerNorm(tokens.dim, eps=tokens.norm_eps)
        self.dropout = nn.Dropout(tokens.dropout)
        self.units = BlockStack(
            tokens.dim,
            config.unit_heads,
            config.unit_layers,
            config.unit_levels,
            rope_theta=tokens.rope_theta,
            dropout=tokens.dropout,
            norm_eps=tokens.norm_eps,
        )
        self.score = nn.Linear(tokens.dim, 1)
        for table in tables:
            nn.init.normal_(table.weight, std=0.06)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def attach(self, encoder: Encoder) -> DocumentModel:
        """Put the pretrained encoder below a model with a `Backbone`; from then on it is one of its modules.

        Raises:
            ConfigError: the model has an encoder of its own, or the width is another one.
        """
        tokens = self.config.tokens
        if not isinstance(tokens, Backbone) or encoder.config.dim != tokens.vector_dim:
            needed = f"width {tokens.vector_dim}" if isinstance(tokens, Backbone) else "no other encoder than its own"
            raise ConfigError(f"an encoder of width {encoder.config.dim} is given and the model takes {needed}.")
        self.encoder = encoder.requires_grad_(False).train(self.training)
        return self

    def forward(
        self, batch: DocumentBatch, *, focus_fraction: float | None = None, with_focus_scores: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Score units, (batch, units); padded units hold no meaning.

        Args:
            batch: what `collate` made.
            focus_fraction: share of the units that pass the deep blocks; None and 1.0 run all.
            with_focus_scores: return the focus scorer's scores as well, (batch, units), -inf on padded units.
        """
        scored = self.details(batch, focus_fraction=focus_fraction, explain=False)
        if not with_focus_scores:
            return scored.scores
        if scored.tokens is None or scored.tokens.unit_scores is None:
            raise ConfigError("The model has no focus, so it has no focus scores; build it with a Focus.")
        return scored.scores, scored.tokens.unit_scores

    def details(self, batch: DocumentBatch, *, focus_fraction: float | None = None, explain: bool = True) -> Scored:
        """Scores with what led to them; `explain` adds the report of every attention layer (levels only)."""
        tokens, x = self._units_of(batch, focus_fraction, explain=explain)
        units = self.over_units(
            x, batch["unit_features"], padding_mask=batch["unit_padding"], prior=batch["unit_prior"], explain=explain
        )
        return Scored(scores=self.score(units.hidden).squeeze(-1), tokens=tokens, units=units)

    def over_units(
        self, x: Tensor, features: Tensor, *, padding_mask: Tensor | None, prior: Tensor, explain: bool = False
    ) -> Details:
        """What the tokens say about each unit (batch, units, dim), and its features, through the blocks over units."""
        x = self.unit_norm(x)
        for column, table in enumerate(self.features):
            x = x + table(features[..., column])
        found: Details = self.units(
            self.dropout(x), padding_mask=padding_mask, global_prior=prior, return_details=True, explain=explain
        )
        return found

    def _units_of(
        self, batch: DocumentBatch, focus_fraction: float | None, *, explain: bool
    ) -> tuple[Details | None, Tensor]:
        """What the tokens say about each unit, (batch, units, dim)."""
        num_units = batch["unit_features"].shape[1]
        if self.unit_input is not None:
            if focus_fraction is not None and focus_fraction < 1.0:
                raise ConfigError(f"focus_fraction={focus_fraction}: a model on a pretrained encoder has no focus.")
            ids = self._with_hidden_words(batch["input_ids"])
            vectors = self._vectors(batch, num_units)
            words = self.unit_input.word_means(ids, batch["unit_ids"], num_units)
            return None, self.unit_input(vectors, words, batch["unit_padding"])
        assert self.encoder is not None
        tokens = self.encoder(
            self._with_hidden_words(batch["input_ids"]),
            padding_mask=batch["padding_mask"],
            global_prior=batch["global_prior"],
            unit_ids=batch["unit_ids"],
            num_units=num_units,
            focus_fraction=1.0 if focus_fraction is None and self.config.focus else focus_fraction,
            return_details=True,
            explain=explain,
        )
        pooled, _ = mean_by_unit(
            tokens.hidden, batch["unit_ids"], num_units=num_units, padding_mask=batch["padding_mask"]
        )
        return tokens, pooled

    def _vectors(self, batch: DocumentBatch, num_units: int) -> Tensor:
        dtype = self.score.weight.dtype
        if "unit_vectors" in batch:
            return batch["unit_vectors"].to(dtype)
        if self.encoder is None:
            raise ConfigError("the pretrained encoder is not attached; attach it, or give unit_vectors in the batch.")
        assert isinstance(self.config.tokens, Backbone)
        return unit_vectors(self.encoder, self.config.tokens, batch["input_ids"], batch["unit_ids"], num_units).to(
            dtype
        )

    def _with_hidden_words(self, input_ids: Tensor) -> Tensor:
        if not self.training or self.config.word_dropout == 0.0:
            return input_ids
        # the padding token's vector is zero, so a hidden word says nothing
        hidden = torch.rand(input_ids.shape, device=input_ids.device) < self.config.word_dropout
        return input_ids.masked_fill(hidden, PADDING_ID)

    def dense(self) -> DocumentModel:
        """The same model with dense attention and a copy of every shared weight."""
        return self._with_config(self.config.dense())

    def with_levels(self, token_levels: LayerLevels, unit_levels: LayerLevels) -> DocumentModel:
        """The same model with other levels and a copy of every shared weight; extra weights are freshly initialised.

        Raises:
            ConfigError: token levels for a model on a pretrained encoder, whose levels come from its conversion.
        """
        if isinstance(self.config.tokens, Backbone) and token_levels is not None:
            raise ConfigError("the levels of a pretrained encoder come from its conversion; give None for the tokens.")
        return self._with_config(self.config.with_levels(token_levels, unit_levels))

    def _with_config(self, config: DocumentConfig) -> DocumentModel:
        weight = self.score.weight
        twin = DocumentModel(config).to(device=weight.device, dtype=weight.dtype).train(self.training)
        if isinstance(config.tokens, Backbone) and self.encoder is not None:
            twin.attach(dense_twin(self.encoder))
        copy_shared(self, twin)
        return twin
