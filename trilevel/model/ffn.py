"""The feed-forward part of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def check_activation(activation: str) -> None:
    """Raise `ConfigError` unless `activation` is one of `Activation`."""
    if activation not in _FUNCTIONS:
        raise ConfigError(f"activation={activation!r} is unknown; known are {', '.join(get_args(Activation))}.")


class FeedForward(nn.Module):
    """Two linear maps with an activation between, `(..., dim)` to `(..., dim)`.

    Args:
        dim: width of a token.
        ffn_dim: width between the maps.
        activation: `gelu`, `gelu_tanh` (the tanh approximation), `relu` or `silu`.
        is_gated: `down(activation(a) * b)` with `a, b` the halves of `up(x)`, which is twice as wide (GeGLU for
            `gelu`; Shazeer 2020, arXiv 2002.05202).
        bias: biases in both maps.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *,
        activation: Activation = "gelu",
        is_gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.up = nn.Linear(dim, 2 * ffn_dim if is_gated else ffn_dim, bias=bias)
        self.down = nn.Linear(ffn_dim, dim, bias=bias)
        self.activation, self.is_gated = activation, is_gated

    def forward(self, x: Tensor) -> Tensor:
        """Map each token on its own."""
        activate = _FUNCTIONS[self.activation]
        wide = self.up(x)
        if self.is_gated:
            inner, gate = wide.chunk(2, dim=-1)
            wide = activate(inner) * gate
        else:
            wide = activate(wide)
        down: Tensor = self.down(wide)
        return down

    def extra_repr(self) -> str:
        """What stands between the maps."""
        return f"activation={self.activation}, is_gated={self.is_gated}"
