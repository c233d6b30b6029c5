"""SmoothQuant: the function stays, the outliers of activations go, and nothing is multiplied that can be folded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.compression.layers import QuantizedLinear
from trilevel.compression.quantize import QuantizeConfig, prepare
from trilevel.compression.smooth import smooth
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=8, num_global_tokens=3, num_sinks=2)
# the maps whose input is multiplied when the model runs
KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "pre_norm": ({}, {"ffn.down"}),
    "pre_norm_gated": ({"is_gated": True}, set()),
    "no_biases": ({"bias": False, "norm_bias": False}, {"ffn.down"}),
    "post_norm": ({"norm_first": False}, {"attention.in_proj", "ffn.up", "ffn.down"}),
    "strict": ({"levels": replace(LEVELS, mode="strict", num_sinks=0)}, {"ffn.down"}),
    "dense": ({"levels": None}, {"ffn.down"}),
    "some_dense_heads": ({"num_heads": 8, "num_kv_heads": 4, "num_dense_heads": 2}, {"ffn.down"}),
    "rope": ({"rope_theta": 100.0, "num_heads": 6, "dim": 24}, {"ffn.down"}),
}


def encoder(kind: str) -> Encoder:
    given: dict[str, Any] = {"vocab_size": 101, "dim": 24, "num_heads": 6, "num_kv_heads": 3, "num_layers": 2}
    given |= {"levels": LEVELS, "ffn_dim": 40, "rope_theta": None, **KINDS[kind][0]}
    model = Encoder(EncoderConfig(**given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        # outliers in a feature
        for block in (0, 1):
            model.get_parameter(f"stack.blocks.{block}.ffn_norm.weight")[3] = 19.0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_stays(kind: str) -> None:
    model = encoder(kind)
    data = [torch.randint(1, 101, (2, tokens)) for tokens in (13, 41)]
    draft = prepare(model, QuantizeConfig(smooth=0.5, quantize_embeddings=False), data)
    with torch.no_grad():
        torch.testing.assert_close(draft.model(data[1]), model(data[1]), rtol=1e-4, atol=1e-4)
    multiplied = {
        ".".join(name.split(".")[-2:])
        for name, layer in draft.made.items()
        if isinstance(layer, QuantizedLinear) and layer.reads.input_multiplier is not None
    }
    assert multiplied == KINDS[kind][1]
    changed = any(
        not torch.equal(one, other) for one, other in zip(model.parameters(), draft.model.parameters(), strict=True)
    )
    assert changed


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_rule(alpha: float) -> None:
    linear = nn.Linear(3, 5)
    weight, largest = linear.weight.detach().clone(), torch.tensor([7.0, 0.0, 0.2])
    factor = smooth(linear, {linear: largest}, alpha)[linear]
    for j, a in enumerate(largest.tolist()):
        wanted = a**alpha / float(weight[:, j].abs().max()) ** (1 - alpha) if a else 1.0
        assert float(1 / factor[j]) == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(linear.weight[:, j], weight[:, j] * wanted)


def test_half_and_half_makes_both_sides_equal() -> None:
    linear, x = nn.Linear(7, 11), torch.randn(53, 7) * torch.tensor([1.0, 1, 50, 1, 0.1, 1, 1])
    factor = smooth(linear, {linear: x.abs().amax(0)}, 0.5)[linear]
    torch.testing.assert_close((x * factor).abs().amax(0), linear.weight.abs().amax(0))


def test_outliers_cost_less() -> None:
    model = encoder("pre_norm")
    data = [torch.randint(1, 101, (2, 41))]

    def error(alpha: float | None) -> float:
        from trilevel.compression.quantize import quantize

        config = QuantizeConfig(observer="minmax", smooth=alpha, quantize_embeddings=False)
        with torch.no_grad():
            wanted: Tensor = model(data[0])
            return float((quantize(model, config, data)(data[0]) - wanted).norm() / wanted.norm())

    assert error(0.5) < 0.7 * error(None)


def test_heads_that_share_values_share_the_scale() -> None:
    model = encoder("some_dense_heads")
    data = [torch.randint(1, 101, (2, 41))]
    draft = prepare(model, QuantizeConfig(smooth=1.0, quantize_embeddings=False), data)
    seen: list[Tensor] = []
    draft.model.get_submodule("stack.blocks.0.attention.out_proj").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        draft.model(data[0])
    # with alpha 1 the larger of the 2 heads of each of 4 groups reaches 1 in each of 3 features
    largest = seen[0].abs().flatten(0, 1).amax(0).view(4, 2, 3).amax(1)
    torch.testing.assert_close(largest, torch.ones(4, 3), rtol=1e-4, atol=1e-4)
