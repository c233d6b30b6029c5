from __future__ import annotations

import json
from typing import Any

import pytest

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError
from trilevel.model import presets
from trilevel.model.config import EncoderConfig, LayerLevels
from trilevel.model.encoder import Encoder
from trilevel.model.focus import Focus

SIZES: dict[str, Any] = {"vocab_size": 11, "dim": 24, "num_heads": 4, "num_layers": 3}
LEVELS = Levels(ratio=LevelRatio(2, 1, 1), window=5, region_size=None, num_regions=7, num_sinks=2)


@pytest.mark.parametrize("levels", [None, LEVELS, (LEVELS, None, Levels(mode="strict"))])
@pytest.mark.parametrize("focus", [None, Focus(after_layer=2, fraction=0.3)])
def test_config_survives_json(levels: LayerLevels, focus: Focus | None) -> None:
    config = EncoderConfig(**SIZES, levels=levels, focus=focus, padding_id=None, rope_theta=None, ffn_dim=31)
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"widht": 3}, "EncoderConfig: unknown key 'widht'; known are vocab_size, dim"),
        ({"levels": {"windows": 3}}, "Levels: unknown key 'windows'"),
        ({"levels": {"ratio": [1, 2]}}, r"ratio=\[1, 2\] must be three shares"),
        ({"levels": [None]}, "levels has 1 entries and the model 3 blocks"),
        ({"levels": 3}, "levels=3 is neither null nor an object"),
        ({"focus": {"after": 1}}, "Focus: unknown key 'after'"),
        ({"focus": 0.2}, "Focus: 0.2 is no table of values"),
        ({"dim": 25}, "dim=25 is no multiple of num_heads=4"),
        ({"dim": "wide"}, "EncoderConfig: a value has the wrong type"),
        ({"num_kv_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"num_layers": 0}, "num_layers=0 must be >= 1"),
        ({"ffn_dim": 0}, "ffn_dim=0 must be >= 1"),
        ({"vocab_size": 0}, "vocab_size=0 must be >= 1"),
        ({"padding_id": 11}, "padding_id=11 is no token of a vocabulary of 11"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be > 0"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"focus": {"after_layer": 3}}, "after_layer=3 leaves no block of num_layers=3"),
        ({"focus": {"after_layer": 0}}, "after_layer=0 must be >= 1"),
        ({"focus": {"after_layer": 1, "fraction": 0.0}}, r"fraction=0.0 must lie in \(0, 1\]"),
        ({"focus": {"after_layer": 1}, "is_causal": True}, "a causal model would see its future"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], match: str) -> None:
    values = EncoderConfig(**SIZES, levels=None).to_dict() | change
    with pytest.raises(ConfigError, match=match):
        EncoderConfig.from_dict(values)


def test_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="EncoderConfig: 'levels', 'vocab_size' is missing"):
        EncoderConfig.from_dict({"dim": 24, "num_heads": 4, "num_layers": 3})


def test_small_preset_fits_its_promise() -> None:
    model = Encoder(presets.small(6_000))
    assert sum(4 * parameter.numel() for parameter in model.parameters()) < 20e6


def test_presets_have_the_published_sizes() -> None:
    assert (presets.minilm().dim, presets.minilm().num_layers) == (384, 6)
    assert (presets.base().dim, presets.base().num_heads) == (768, 12)
    assert presets.tiny(5, levels=None).levels is None
