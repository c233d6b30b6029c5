"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split form as in Llama and ModernBERT."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, *, theta: float = 10_000.0) -> Tensor:
    """Rotate every pair (x_c, x_{c + dim/2}) by position * theta^(-2c/dim).

    Args:
        x: (batch, heads, tokens, dim), dim even.
        positions: (batch or 1, tokens) integers.
        theta: base of the wavelengths.

    Returns:
        Like x; angles are computed in float32 at least.
    """
    half = x.shape[-1] // 2
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=kind) / half)
    angle = positions.to(kind)[:, None, :, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
