"""What a model costs: the same numbers before and after its integers are stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.compression.models import encoder, tokens
from trilevel.compression.distill import Outputs
from trilevel.compression.measure import count_parameters, latency_ms, size
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize


@pytest.mark.parametrize("config", [QuantizeConfig(), QuantizeConfig(activations=None, weight_bits=4, smooth=None)])
def test_stored_integers_count(config: QuantizeConfig) -> None:
    model = encoder()
    rounded = quantize(model, config, [tokens()])
    assert count_parameters(freeze(rounded)) == count_parameters(rounded) == count_parameters(model)
    assert size(freeze(rounded)) == size(rounded)
    assert size(rounded)["bytes"] < size(model)["bytes"]


def test_models_take_turns_and_the_first_does_not_count() -> None:
    seen: list[nn.Module] = []

    def forward(model: nn.Module, batch: Tensor) -> Outputs:
        seen.append(model)
        assert torch.is_inference_mode_enabled()
        return Outputs(logits=model(batch))

    models: dict[str, nn.Module] = {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}
    times = latency_ms(models, torch.ones(1, 3), forward, repeats=2)
    assert seen == [models["a"], models["b"]] * 3
    assert set(times) == {"a", "b"}
    assert min(times.values()) > 0
