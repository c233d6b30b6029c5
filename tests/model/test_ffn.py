from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trilevel.errors import ConfigError
from trilevel.model.ffn import Activation, FeedForward

FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x * torch.sigmoid(x),
}


@pytest.mark.parametrize("activation", list(FORMULAS))
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_is_the_formula(activation: Activation, is_gated: bool, bias: bool) -> None:
    part = FeedForward(5, 7, activation=activation, is_gated=is_gated, bias=bias).double()
    x = 3 * torch.randn(2, 11, 5, dtype=torch.float64)
    wide: Tensor = x @ part.up.weight.T
    if bias:
        wide = wide + part.up.bias
    inner = FORMULAS[activation](wide[..., :7])
    assert wide.shape[-1] == (14 if is_gated else 7)
    wanted = F.linear(inner * wide[..., 7:] if is_gated else inner, part.down.weight, part.down.bias)
    torch.testing.assert_close(part(x), wanted)
    assert (part.up.bias is not None, part.down.bias is not None) == (bias, bias)


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ConfigError, match="activation='mish' is unknown; known are gelu, gelu_tanh, relu, silu"):
        FeedForward(5, 7, activation="mish")  # type: ignore[arg-type]
