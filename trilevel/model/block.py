"""A transformer block: attention and feed-forward part, each added to the residual stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trilevel.attention.layer import Explanation, MultiLevelAttention
from trilevel.attention.levels import Levels
from trilevel.model.ffn import Activation, FeedForward

INIT_STD = 0.02
CHUNK_TOKENS = 4_096
"""Tokens that pass the feed-forward part at a time when no gradient is kept; bounds its memory at long inputs."""


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`; with `norm_first=False` `norm(x + attention(x))`, then
    `norm(x + ffn(x))`.

    Args:
        dim: width of the residual stream.
        num_heads: attention heads.
        levels: what the heads see; None is dense attention with the same shared parameters.
        num_kv_heads: key and value heads; default `num_heads`.
        head_dim: width of a head; default `dim // num_heads`.
        num_dense_heads: heads that see everything beside those with levels.
        ffn_dim: width inside the feed-forward part; default `4 * dim`.
        rope_theta: base of the rotary positions, None for none.
        dropout: on what each part adds.
        norm_eps: epsilon of the layer norms.
        is_causal: a token sees no later token.
        norm_first: norms stand before the parts (pre-norm), else behind the sums (post-norm), as in torch's
            `TransformerEncoderLayer`.
        has_attention_norm: False leaves out the norm at the attention, for input that is normalised already.
        bias: biases in the linear maps.
        norm_bias: biases in the norms.
        activation: of the feed-forward part.
        is_gated: the feed-forward part is gated, see `FeedForward`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        levels: Levels | None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_dense_heads: int = 0,
        ffn_dim: int | None = None,
        rope_theta: float | None = None,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        is_causal: bool = False,
        norm_first: bool = True,
        has_attention_norm: bool = True,
        bias: bool = True,
        norm_bias: bool = True,
        activation: Activation = "gelu",
        is_gated: bool = False,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps, bias=norm_bias) if has_attention_norm else nn.Identity()
        self.attention = MultiLevelAttention(
            dim,
            num_heads,
            head_dim,
            levels=levels,
            num_kv_heads=num_kv_heads,
            num_dense_heads=num_dense_heads,
            bias=bias,
            rope_theta=rope_theta,
            is_causal=is_causal,
        )
        self.ffn_norm = nn.LayerNorm(dim, eps=norm_eps, bias=norm_bias)
        self.ffn = FeedForward(
            dim, 4 * dim if ffn_dim is None else ffn_dim, activation=activation, is_gated=is_gated, bias=bias
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        positions: Tensor | None = None,
        global_prior: Tensor | None = None,
        global_forced: Tensor | None = None,
        explain: bool = False,
    ) -> Tensor | tuple[Tensor, Explanation | None]:
        """Map `(batch, tokens, dim)` to the same shape; the arguments are those of `MultiLevelAttention`.

        With `explain` the attention's report comes along, None for dense attention.
        """
        is_explained = explain and self.attention.levels is not None
        attended = self.attention(
            self.attention_norm(x) if self.norm_first else x,
            padding_mask=padding_mask,
            segment_ids=segment_ids,
            num_segments=num_segments,
            positions=positions,
            global_prior=global_prior,
            global_forced=global_forced,
            explain=is_explained,
        )
        attended, explanation = attended if is_explained else (attended, None)
        out = self._finish(x, self.dropout(attended))
        return (out, explanation) if explain else out

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            x = x + attended
            return x.add(self.dropout(self.ffn(self.ffn_norm(x)))) if self.norm_first else self._post_norm(x)
        # attended is ours, so the residual is added in place; under autocast its narrower type would round the stream
        residual = attended.add_(x) if attended.dtype == x.dtype else x + attended
        tokens = residual.reshape(-1, x.shape[-1])
        for chunk in tokens.split(CHUNK_TOKENS):
            if self.norm_first:
                chunk += self.dropout(self.ffn(self.ffn_norm(chunk)))
            else:
                chunk.copy_(self._post_norm(chunk))
        return tokens.view(x.shape)

    def _post_norm(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x)
        normed: Tensor = self.ffn_norm(x + self.dropout(self.ffn(x)))
        return normed


def init_weights(module: nn.Module, *, num_layers: int) -> None:
    """GPT-2's initialisation: normal(0, 0.02), biases zero, maps into the residual stream divided by sqrt(2 layers).

    Pooling, scorer and gate of the attention keep their own initialisation (zero gates, mean pooling), so models with
    and without levels start from the same function of their shared weights.
    """
    residual_std = INIT_STD / math.sqrt(2 * num_layers)
    for part in module.modules():
        if isinstance(part, MultiLevelAttention):
            _init_linear(part.in_proj, INIT_STD)
            _init_linear(part.out_proj, residual_std)
        elif isinstance(part, FeedForward):
            _init_linear(part.up, INIT_STD)
            _init_linear(part.down, residual_std)
        elif isinstance(part, nn.Conv2d):
            _init_linear(part, INIT_STD)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=INIT_STD)
            if part.padding_idx is not None:
                nn.init.zeros_(part.weight[part.padding_idx])


def _init_linear(linear: nn.Linear | nn.Conv2d, std: float) -> None:
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
