"""Images to vectors: one for each patch, behind a few learned tokens (ViT, arXiv 2010.11929; DeiT, 2012.12877)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilevel.errors import ConfigError, ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """How an image is cut.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of a patch; both divide the image's.
        num_channels: values of a pixel.
        num_extra_tokens: learned tokens before the patches: 1 for a class token, 2 with a distillation token.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int = 3
    num_extra_tokens: int = 1

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("image_size", "patch_size"):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or len(given) != 2 or min(given) < 1:
                raise ConfigError(f"Patches: {name}={given!r} must be (height, width), both >= 1.")
            # JSON knows lists only
            object.__setattr__(self, name, tuple(given))
        if any(image % patch for image, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ConfigError(
                f"Patches: patch_size={self.patch_size} does not divide image_size={self.image_size}; "
                "crop or resize the images."
            )
        if self.num_channels < 1 or self.num_extra_tokens < 0:
            raise ConfigError(
                f"Patches: num_channels={self.num_channels} must be >= 1 and "
                f"num_extra_tokens={self.num_extra_tokens} >= 0."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_tokens(self) -> int:
        """Tokens that an image becomes, the extra ones counted."""
        return self.num_extra_tokens + self.grid[0] * self.grid[1]


class PatchEmbedding(nn.Module):
    """Images (batch, channels, height, width) to tokens (batch, extra + patches, dim), patches row by row.

    Args:
        patches: how an image is cut.
        dim: width of a token.
        dropout: on the tokens.
        norm: what follows the sum of patch and position; None for nothing.
    """

    def __init__(self, patches: Patches, dim: int, *, dropout: float = 0.0, norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.patches = patches
        self.projection = nn.Conv2d(patches.num_channels, dim, patches.patch_size, stride=patches.patch_size)
        self.extra_tokens = nn.Embedding(patches.num_extra_tokens, dim)
        self.positions = nn.Embedding(patches.num_tokens, dim)
        self.norm = norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed images of the configured size.

        Raises:
            ShapeError: another size, other channels, or integers.
        """
        wanted = (self.patches.num_channels, *self.patches.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted or not pixels.is_floating_point():
            raise ShapeError(
                f"pixels have shape {tuple(pixels.shape)} and type {pixels.dtype}; floating-point numbers "
                f"(batch, {', '.join(map(str, wanted))}) are needed. Resize and normalise the images."
            )
        vectors = self.projection(pixels).flatten(2).transpose(1, 2)
        extra = self.extra_tokens.weight.expand(len(pixels), -1, -1)
        vectors = torch.cat([extra, vectors], dim=1) + self.positions.weight
        embedded: Tensor = self.dropout(vectors if self.norm is None else self.norm(vectors))
        return embedded
