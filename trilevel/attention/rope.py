"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split form as in Llama and ModernBERT."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, dim: int, *, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * theta^(-2c/dim), both (batch or 1, tokens, dim / 2), float32.

    Args:
        positions: (batch or 1, tokens) integers.
        dim: features of a head, even.
        theta: base of the wavelengths.
    """
    angle = _angles(positions, dim, theta, torch.float32)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every pair (x_c, x_{c + dim/2}) of x (batch, heads, tokens, dim) by the angles of the tables."""
    half = x.shape[-1] // 2
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def rotary(x: Tensor, positions: Tensor, *, theta: float = 10_000.0) -> Tensor:
    """Rotate x (batch, heads, tokens, dim), dim even, by `positions`; angles are computed in float32 at least."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = _angles(positions, x.shape[-1], theta, kind)
    return rotate(x, angle.cos(), angle.sin())


def _angles(positions: Tensor, dim: int, theta: float, kind: torch.dtype) -> Tensor:
    half = dim // 2
    frequency = theta ** (-torch.arange(half, device=positions.device, dtype=kind) / half)
    return positions.to(kind)[..., None] * frequency
