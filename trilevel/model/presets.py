"""Encoders in usual sizes; change a field with `dataclasses.replace`."""

from __future__ import annotations

from trilevel.attention.levels import Levels
from trilevel.model.config import EncoderConfig, LayerLevels

_TEXT = Levels()


def tiny(vocab_size: int, *, levels: LayerLevels = _TEXT) -> EncoderConfig:
    """2 blocks of width 128, 4 heads: trains in minutes on a CPU.

    >>> tiny(8_000).dim
    128
    """
    return EncoderConfig(vocab_size=vocab_size, dim=128, num_heads=4, num_layers=2, levels=levels)


def small(vocab_size: int, *, levels: LayerLevels = _TEXT) -> EncoderConfig:
    """4 blocks of width 256, 8 heads: under 20 MB with a vocabulary of 6,000."""
    return EncoderConfig(vocab_size=vocab_size, dim=256, num_heads=8, num_layers=4, levels=levels)


def minilm(vocab_size: int = 30_522, *, levels: LayerLevels = _TEXT) -> EncoderConfig:
    """The sizes of MiniLM-L6: 6 blocks of width 384, 12 heads (arXiv 2002.10957)."""
    return EncoderConfig(vocab_size=vocab_size, dim=384, num_heads=12, num_layers=6, levels=levels)


def base(vocab_size: int = 30_522, *, levels: LayerLevels = _TEXT) -> EncoderConfig:
    """The sizes of BERT-base: 12 blocks of width 768, 12 heads (arXiv 1810.04805)."""
    return EncoderConfig(vocab_size=vocab_size, dim=768, num_heads=12, num_layers=12, levels=levels)
