from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError
from trilevel.model import presets
from trilevel.model.config import EncoderConfig, LayerLevels, head_width, uniform_heads
from trilevel.model.encoder import Encoder
from trilevel.model.focus import Focus
from trilevel.model.patches import Patches

SIZES: dict[str, Any] = {"vocab_size": 11, "dim": 24, "num_heads": 4, "num_layers": 3}
LEVELS = Levels(ratio=LevelRatio(2, 1, 1), window=5, region_size=None, num_regions=7, num_sinks=2)


@pytest.mark.parametrize("levels", [None, LEVELS, (LEVELS, None, Levels(mode="strict"))])
@pytest.mark.parametrize("focus", [None, Focus(after_layer=2, fraction=0.3)])
def test_config_survives_json(levels: LayerLevels, focus: Focus | None) -> None:
    config = EncoderConfig(**SIZES, levels=levels, focus=focus, padding_id=None, rope_theta=None, ffn_dim=31)
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# every field away from its default, so that one which is lost on the way shows
ALL_CHANGED: dict[str, Any] = {
    "num_kv_heads": (2, 4, 1),
    "head_dim": 10,
    "num_dense_heads": (2, 0, 4),
    "ffn_dim": (31, 29, 37),
    "rope_theta": (3.0, None, 7.0),
    "dropout": 0.3,
    "norm_eps": 0.1,
    "is_causal": True,
    "padding_id": None,
    "max_tokens": 97,
    "has_first_norm": False,
    "has_final_norm": False,
    "bias": False,
    "norm_bias": False,
    "activation": "silu",
    "is_gated": True,
    "num_positions": 13,
    "positions_skip_padding": True,
    "num_token_types": 5,
    "has_embedding_norm": True,
}
TOKENS = EncoderConfig(**(SIZES | {"num_heads": (8, 4, 5)}), levels=LEVELS, **ALL_CHANGED)
IMAGES = EncoderConfig(
    **(SIZES | {"vocab_size": None}),
    levels=None,
    norm_first=False,
    patches=Patches(image_size=(6, 15), patch_size=(2, 5), num_channels=2, num_extra_tokens=3),
)


@pytest.mark.parametrize("config", [TOKENS, IMAGES])
def test_every_field_survives_json(config: EncoderConfig) -> None:
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_is_in_one_of_these() -> None:
    plain = EncoderConfig(**SIZES, levels=None)
    fields = {field.name for field in dataclasses.fields(EncoderConfig)}
    changed = {name for name in fields for c in (TOKENS, IMAGES) if getattr(c, name) != getattr(plain, name)}
    # sizes, and what has a test of its own
    assert fields - changed <= {"dim", "num_layers", "focus"}


def test_configuration_of_an_older_version_is_the_same_encoder() -> None:
    old = {
        **SIZES,
        "levels": None,
        "num_kv_heads": None,
        "ffn_dim": None,
        "rope_theta": 10_000.0,
        "dropout": 0.0,
        "norm_eps": 1e-5,
        "is_causal": False,
        "padding_id": 0,
        "focus": None,
        "max_tokens": 65_536,
    }
    config = EncoderConfig.from_dict(old)
    assert config == EncoderConfig(**SIZES, levels=None)
    block = {"attention_norm", "attention.in_proj", "attention.out_proj", "ffn_norm", "ffn.up", "ffn.down"}
    modules = {f"stack.blocks.{index}.{module}" for index in range(3) for module in block} | {"stack.final_norm"}
    wanted = {"embedding.table.weight"} | {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    assert set(Encoder(config).state_dict()) == wanted


def test_an_older_version_reads_what_it_knows() -> None:
    assert "head_dim" not in EncoderConfig(**SIZES, levels=None).to_dict()
    assert EncoderConfig(**SIZES, levels=None, head_dim=5).to_dict()["head_dim"] == 5


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
        ({"num_heads": [4, 2, 4]}, r"num_heads=\(4, 2, 4\) differs from block to block, so that dim=24 does not say"),
        ({"num_heads": [4, 2]}, "num_heads has 2 entries and the model 3 blocks"),
        ({"num_heads": [4, 0, 4], "head_dim": 6}, "num_heads=0 must be >= 1"),
        ({"num_heads": [4, 3, 4], "head_dim": 6, "num_kv_heads": 2}, "num_heads=3 is no multiple of num_kv_heads=2"),
        ({"num_kv_heads": [4, 4]}, "num_kv_heads has 2 entries"),
        ({"head_dim": 0}, "head_dim=0 must be >= 1"),
        ({"ffn_dim": [5, 0, 7]}, "ffn_dim=0 must be >= 1"),
        ({"ffn_dim": [5, 7]}, "ffn_dim has 2 entries"),
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
        ({"rope_theta": [1.0, 2.0]}, "rope_theta has 2 entries and the model 3 blocks"),
        ({"rope_theta": [1.0, -2.0, None]}, "rope_theta=-2.0 must be > 0"),
        ({"activation": "mish"}, "activation='mish' is unknown; known are gelu,"),
        ({"norm_first": False, "has_first_norm": False}, "has_first_norm=False leaves out a norm before attention"),
        ({"num_positions": 0}, "num_positions=0 must be >= 1"),
        ({"num_token_types": 0}, "num_token_types=0 must be >= 1"),
        ({"vocab_size": None}, "exactly one of vocab_size=None and patches=None is needed"),
        ({"patches": {"image_size": [4, 4], "patch_size": [2, 2]}}, "exactly one of vocab_size=11 and patches=Patches"),
        ({"patches": {"size": 4}}, "Patches: unknown key 'size'"),
        (
            {"patches": {"image_size": [4, 4], "patch_size": [2, 2]}, "vocab_size": None, "num_positions": 7},
            "num_positions=7 belongs to tokens; patches have none",
        ),
        (
            {"patches": {"image_size": [4, 4], "patch_size": [2, 2]}, "vocab_size": None, "num_token_types": 2},
            "num_token_types=2 belongs to tokens",
        ),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], match: str) -> None:
    values = EncoderConfig(**SIZES, levels=None).to_dict() | change
    with pytest.raises(ConfigError, match=match):
        EncoderConfig.from_dict(values)


def test_heads_of_pruned_encoders_are_counted() -> None:
    even = EncoderConfig(**SIZES, levels=None)
    assert (uniform_heads(even), head_width(even)) == (4, 6)
    same = dataclasses.replace(even, num_heads=(2, 2, 2), head_dim=7)
    assert (uniform_heads(same), head_width(same)) == (2, 7)
    pruned = dataclasses.replace(even, num_heads=(2, 1, 3), head_dim=7)
    assert head_width(pruned) == 7
    with pytest.raises(ConfigError, match=r"num_heads=\(2, 1, 3\) differs from block to block and as many in each are"):
        uniform_heads(pruned)


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
