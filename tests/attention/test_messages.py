"""Every error says what was given, what is needed and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.attention.cases import BASE, STRICT, Case, inputs
from trilevel.attention.api import multi_level_attention
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError, ImplementationError, ShapeError, TrilevelError

NUM_REGIONS = replace(BASE, region_size=None, num_regions=3)


def _zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"query": _zeros(2, 19, 5)},
            ShapeError,
            r"query must be \(batch, heads, tokens, dim\), got shape \(2, 19, 5\)",
        ),
        ({"key": _zeros(2, 3, 19, 5).int()}, ShapeError, r"key must be floating point like query.*torch.int32"),
        ({"value": _zeros(2, 3, 19, 5).float()}, ShapeError, r"value must be floating point like query.*torch.float32"),
        ({"value": _zeros(2, 3, 19, 7)}, ShapeError, r"key \(2, 3, 19, 5\) and value \(2, 3, 19, 7\)"),
        (
            {"query": _zeros(2, 4, 19, 5)},
            ShapeError,
            r"query \(2, 4, 19, 5\) needs key and value.*a divisor of 4 heads",
        ),
        ({"query": _zeros(2, 3, 17, 5)}, ShapeError, r"query \(2, 3, 17, 5\) needs key and value.*tokens=17"),
        ({"query": _zeros(1, 3, 19, 5)}, ShapeError, r"query \(1, 3, 19, 5\) needs key and value.*batch=1"),
        (dict.fromkeys(("query", "key", "value"), _zeros(2, 3, 0, 5)), ShapeError, "no token; at least one"),
        ({"pool_weight": _zeros(5, 3)}, ShapeError, r"pool_weight must have shape \(3, 5\), got \(5, 3\)"),
        ({"global_score": _zeros(2, 17)}, ShapeError, r"global_score must have shape \(2, 19\), got \(2, 17\)"),
        (
            {"global_prior": _zeros(2, 17)},
            ShapeError,
            r"global_prior must have shape \(2, 19\) or \(19,\), got \(2, 17\)",
        ),
        ({"global_forced": _zeros(2, 17).bool()}, ShapeError, r"global_forced must have shape \(2, 19\)"),
        ({"global_forced": _zeros(2, 19)}, ShapeError, r"global_forced must be bool.*call .bool\(\)"),
        ({"global_forced": torch.ones(2, 19).bool()}, ShapeError, "global_forced marks 19 tokens.*num_global_tokens=3"),
        ({"padding_mask": _zeros(19, 2).bool()}, ShapeError, r"padding_mask must have shape \(2, 19\), got \(19, 2\)"),
        ({"padding_mask": _zeros(2, 19).int()}, ShapeError, r"padding_mask must be bool \(True = .*call .bool\(\)"),
        ({"segment_ids": _zeros(2, 17).long()}, ShapeError, r"segment_ids must have shape \(2, 19\)"),
        ({"segment_ids": _zeros(2, 19)}, ShapeError, r"segment_ids must be integers.*call .long\(\)"),
        ({"segment_ids": -torch.ones(2, 19).long()}, ShapeError, "segment_ids must be >= 0 and never decrease"),
        ({"segment_ids": torch.arange(19).flip(0).expand(2, 19)}, ShapeError, "never decrease along a row"),
        (
            {"segment_ids": torch.arange(19).expand(2, 19), "num_segments": 7},
            ShapeError,
            "segment_ids name 19 segments, num_segments=7",
        ),
        ({"region_gate": _zeros(2, 19, 1)}, ConfigError, "region_gate belongs to mode='strict'"),
        ({"levels": STRICT, "region_gate": _zeros(2, 19, 2)}, ShapeError, r"region_gate must have shape \(2, 19, 1\)"),
        ({"levels": STRICT, "is_causal": True}, ConfigError, "mode='strict' is bidirectional.*mode='calibrated'"),
        ({"levels": NUM_REGIONS, "is_causal": True}, ConfigError, "num_regions=3.*Use region_size="),
        (
            {"levels": replace(BASE, ratio=LevelRatio(1, 1, 1)), "impl": "fast"},
            ImplementationError,
            "impl='fast'.*'auto'",
        ),
    ],
)
def test_attention_says_what_is_wrong(changes: dict[str, Any], error: type[TrilevelError], message: str) -> None:
    arguments = inputs(Case(name="message", extras=False)) | changes
    with pytest.raises(error, match=message):
        multi_level_attention(**arguments)


def test_too_few_groups_for_the_shares() -> None:
    arguments = inputs(Case(name="groups", heads=4, kv_heads=4, extras=False))
    grouped = {**arguments, "key": arguments["key"][:, :2], "value": arguments["value"][:, :2]}
    with pytest.raises(ConfigError, match=r"3 non-zero shares.*KV groups, got 2"):
        multi_level_attention(**grouped)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((30, 4), {}, "embed_dim=30 must be a multiple of num_heads=4"),
        ((32, 4), {"num_kv_heads": 3}, "num_heads one of num_kv_heads=3"),
        ((32, 0), {}, "num_heads=0"),
        ((20, 4), {"rope_theta": 10_000.0}, "even head size, got 5"),
        ((32, 2), {}, "3 non-zero shares.*got 2"),
    ],
)
def test_layer_says_what_is_wrong(sizes: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiLevelAttention(*sizes, levels=Levels(), **options)


@pytest.mark.parametrize("shape", [(2, 19), (2, 19, 31), (2, 3, 19, 32)])
def test_layer_input_shape(shape: tuple[int, ...]) -> None:
    layer = MultiLevelAttention(32, 4, levels=Levels())
    with pytest.raises(ShapeError, match=r"x must be \(batch, tokens, 32\), got"):
        layer(torch.zeros(shape))


def test_explain_needs_levels_and_one_sequence() -> None:
    x = torch.zeros(2, 19, 32)
    with pytest.raises(ConfigError, match="explain=True needs levels"):
        MultiLevelAttention(32, 4, levels=None)(x, explain=True)
    layer = MultiLevelAttention(32, 4, levels=BASE)
    with pytest.raises(ConfigError, match="segment_ids must be None"):
        layer(x, segment_ids=torch.zeros(2, 19).long(), explain=True)
