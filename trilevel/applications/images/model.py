"""The classifier: bytes of pixels, an encoder of patches, the mean of the tokens, a linear map to the classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trilevel.errors import ConfigError, ShapeError
from trilevel.model.config import EncoderConfig, from_mapping
from trilevel.model.encoder import Encoder
from trilevel.model.exits import check_exits, exit_heads, run_segments
from trilevel.model.heads import SequenceHead
from trilevel.model.patches import PatchEmbedding, Patches


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageClassifierConfig:
    """All that an image classifier is, but for its weights.

    Args:
        encoder: of the encoder, patches and levels included.
        labels: names of the classes, in the order of the logits.
        mean: of the pixels, from 0 to 255, one for each channel.
        deviation: of the pixels, likewise.
        dropout: before the linear map.
        exits: blocks behind which a head of its own answers too, see `run_segments`.
    """

    encoder: EncoderConfig
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    dropout: float = 0.0
    exits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check every value."""
        if self.encoder.patches is None:
            raise ConfigError("ImageClassifierConfig: an encoder with patches is needed; this one reads tokens.")
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"ImageClassifierConfig: labels={self.labels} must be two or more different names.")
        channels = self.encoder.patches.num_channels
        if len(self.mean) != channels or len(self.deviation) != channels or not min(self.deviation) > 0:
            raise ConfigError(
                f"ImageClassifierConfig: mean={self.mean} and deviation={self.deviation} must hold {channels} numbers, "
                "one for each channel, the deviations above 0."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"ImageClassifierConfig: dropout={self.dropout} must lie in [0, 1).")
        check_exits(self.exits, self.encoder)

    @property
    def patches(self) -> Patches:
        """How an image is cut."""
        assert self.encoder.patches is not None
        return self.encoder.patches

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types; `from_dict` gives an equal one back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: list(values[name]) for name in ("labels", "mean", "deviation")}
        # older runs have none
        exits = {"exits": list(self.exits)} if self.exits else {}
        del values["exits"]
        return {**values, **lists, **exits, "encoder": self.encoder.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageClassifierConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        if not isinstance(values.get("encoder"), Mapping):
            raise ConfigError("ImageClassifierConfig: an encoder table is needed.")
        own: dict[str, Any] = {"encoder": EncoderConfig.from_dict(values["encoder"])}
        for name in ("labels", "mean", "deviation"):
            if not isinstance(values.get(name), list):
                raise ConfigError(f"ImageClassifierConfig: a list {name!r} is needed.")
            own[name] = tuple(values[name])
        return from_mapping(cls, dict(values) | own | {"exits": tuple(values.get("exits", ()))})


_HEAD_STD = 0.02
_MAPS = ("in_proj", "out_proj", "up", "down")


class Classified(NamedTuple):
    """`logits` (batch, classes) and the encoder's output `hidden` (batch, tokens, dim)."""

    logits: Tensor
    hidden: Tensor


class ImageClassifier(nn.Module):
    """Pixels to logits of the classes."""

    def __init__(self, config: ImageClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        _init_encoder(self.encoder, config.patches)
        self.head = SequenceHead(config.encoder.dim, len(config.labels), dropout=config.dropout)
        nn.init.normal_(self.head.logits.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.logits.bias)
        self.exits = exit_heads(config.encoder, config.exits, len(config.labels), config.dropout)
        # not saved: they are the configuration's
        for name in ("mean", "deviation"):
            values = torch.tensor(getattr(config, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None], persistent=False)

    mean: Tensor
    deviation: Tensor

    def forward(
        self, pixels: Tensor, *, return_hidden: bool = False, return_exits: bool = False
    ) -> Tensor | Classified:
        """Map `pixels` (batch, channels, height, width), 0 to 255, bytes or not, to logits (batch, classes).

        With `return_hidden` to `Classified`: the vectors of the tokens before their mean as well, for distillation.
        With `return_exits` to the logits of all heads, (batch, segments, classes), the model's own last.

        Raises:
            ShapeError: another size or number of channels.
        """
        if return_exits:
            return run_segments(self, self.embed(pixels))[1]
        hidden = self.encoder(self.normalized(pixels))
        logits = self.answer(hidden)
        return Classified(logits, hidden) if return_hidden else logits

    def embed(self, pixels: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What the first block reads, (batch, tokens, dim); no patch is padding."""
        return self.encoder.embed(self.normalized(pixels))

    def answer(self, hidden: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Logits (batch, classes) of the encoder's output."""
        logits: Tensor = self.head(hidden.to(self.mean.dtype), padding_mask=padding_mask)
        return logits

    def normalized(self, pixels: Tensor) -> Tensor:
        """Pixels with the mean and deviation of the training images taken out."""
        if pixels.ndim != 4 or pixels.shape[1] != len(self.config.mean):
            raise ShapeError(
                f"pixels have shape {tuple(pixels.shape)}; (batch, {len(self.config.mean)}, height, width) is needed."
            )
        return (pixels.to(self.mean.dtype) - self.mean) / self.deviation


def _init_encoder(encoder: Encoder, patches: Patches) -> None:
    """Xavier's weights in the blocks (Glorot and Bengio 2010), LeCun's for the pixels, and positions that are sines.

    The encoder's own numbers are those of wide language models. At a width of 160 the blocks then add next to nothing
    and pixels are lost beside it: after 150 steps on Fashion-MNIST in patches of 4 x 4 (dim 96, 3 layers) 29% of a
    batch are right in place of 60%.
    """
    for name, part in encoder.stack.named_modules():
        # scorer and gates keep theirs
        if isinstance(part, nn.Linear) and name.endswith(_MAPS):
            nn.init.xavier_uniform_(part.weight)
    embedding: PatchEmbedding = encoder.embedding
    weight = embedding.projection.weight
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    with torch.no_grad():
        embedding.positions.weight[patches.num_extra_tokens :] = sines(patches.grid, weight.shape[0])


def sines(grid: tuple[int, int], dim: int) -> Tensor:
    """Positions (rows * columns, dim) of a grid, row by row: half of the numbers tell the row and half the column.

    Each half holds sines and cosines of `dim / 4` wave lengths (Beyer et al. 2022, arXiv 2205.01580); zeros where `dim`
    is no multiple of 4.
    """
    rates = 10_000.0 ** -torch.linspace(0, 1, dim // 4)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in (rows, columns)]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return nn.functional.pad(torch.cat(waves, dim=1), (0, dim % 4))
