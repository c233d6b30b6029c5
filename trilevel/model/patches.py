"""Images to vectors: one for each patch, behind a few learned tokens (ViT, arXiv 2010.11929; DeiT, 2012.12877)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trilevel.errors import ConfigError, ShapeError
from trilevel.model.grid_order import ORDERS, GridOrder, cells_in_order


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """How an image is cut.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of a patch; both divide the image's.
        num_channels: values of a pixel.
        num_extra_tokens: learned tokens before the patches: 1 for a class token, 2 with a distillation token.
        order: how the patches stand behind the extra tokens: `rows`, row by row; `hilbert`, along a Hilbert curve, so
            that the windows and regions of `Levels` are compact parts of the image; `tiles`, tile by tile, so that a
            region of `tile[0] * tile[1]` tokens is one tile. Dense attention without rotary positions does
            not see the order.
        tile: rows and columns of patches in a tile, which divide the grid; for `tiles` only.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int = 3
    num_extra_tokens: int = 1
    order: GridOrder = "rows"
    tile: tuple[int, int] | None = None

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
        self._check_order()

    def _check_order(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"Patches: order={self.order!r} is unknown; known are {', '.join(ORDERS)}.")
        if (self.tile is not None) != (self.order == "tiles"):
            raise ConfigError(
                f"Patches: order={self.order!r} and tile={self.tile}; order='tiles' needs a tile (rows, columns), any "
                "other order None."
            )
        if self.tile is None:
            return
        if not isinstance(self.tile, (tuple, list)) or len(self.tile) != 2 or min(self.tile) < 1:
            raise ConfigError(f"Patches: tile={self.tile!r} must be (rows, columns), both >= 1.")
        object.__setattr__(self, "tile", tuple(self.tile))
        if any(side % part for side, part in zip(self.grid, self.tile, strict=True)):
            raise ConfigError(
                f"Patches: tile={self.tile} does not divide the grid of {self.grid[0]} x {self.grid[1]} patches; "
                "choose another tile, or order='hilbert', which any grid has."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_tokens(self) -> int:
        """Tokens that an image becomes, the extra ones counted."""
        return self.num_extra_tokens + self.grid[0] * self.grid[1]

    def token_order(self) -> list[int]:
        """Which token of the order `rows` stands at each place, extra ones included.

        >>> Patches(image_size=(4, 4), patch_size=(1, 2), order="tiles", tile=(2, 1)).token_order()
        [0, 1, 3, 5, 7, 6, 8, 2, 4]
        """
        extra = self.num_extra_tokens
        cells = cells_in_order(self.grid, self.order, self.tile or (1, 1))
        return [*range(extra), *(extra + cell for cell in cells)]


class PatchEmbedding(nn.Module):
    """Images (batch, channels, height, width) to tokens (batch, extra + patches, dim).

    The table of positions is row by row in every order, so that weights serve any of them.

    Args:
        patches: how an image is cut.
        dim: width of a token.
        dropout: on the tokens.
        norm: what follows the sum of patch and position; None for nothing.
    """

    order: Tensor | None

    def __init__(self, patches: Patches, dim: int, *, dropout: float = 0.0, norm: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.patches = patches
        self.projection = nn.Conv2d(patches.num_channels, dim, patches.patch_size, stride=patches.patch_size)
        self.extra_tokens = nn.Embedding(patches.num_extra_tokens, dim)
        self.positions = nn.Embedding(patches.num_tokens, dim)
        # not saved: it follows from the configuration
        self.register_buffer("order", _reordering(patches), persistent=False)
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
        extra = _rows(self.extra_tokens).expand(pixels.shape[0], -1, -1)
        vectors = torch.cat([extra, vectors], dim=1) + _rows(self.positions)
        if self.order is not None:
            vectors = vectors.index_select(1, self.order)
        embedded: Tensor = self.dropout(vectors if self.norm is None else self.norm(vectors))
        return embedded


def _rows(table: nn.Embedding) -> Tensor:
    """All of them, read as any table is: one that is quantized rounds what it gives."""
    rows: Tensor = table(torch.arange(table.num_embeddings, device=table.weight.device))
    return rows


def _reordering(patches: Patches) -> Tensor | None:
    return None if patches.order == "rows" else torch.tensor(patches.token_order())
