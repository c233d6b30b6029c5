"""The mask that a transformers model hands from its mask function to its layers: O(tokens), never n x n."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trilevel.errors import ConfigError, ShapeError

_OTHERWISE = "use attn_implementation='sdpa' for this model or input."


class TokenMask(NamedTuple):
    """Which keys a layer sees, the same rule for every query.

    real: (batch, tokens) bool, True = real token (transformers' convention); None when all are.
    radius: tokens on either side that a query sees; None when it sees all.
    """

    real: Tensor | None
    radius: int | None


def make_token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **_: Any,
) -> TokenMask:
    """What `AttentionMaskInterface` calls, with its arguments, once a forward pass for each kind of layer.

    Raises:
        ShapeError: the padding mask or the lengths are not those of self-attention over one input.
        ConfigError: the pattern is neither full nor a window to both sides: causal, packed, chunked or the user's own.
    """
    if use_vmap:
        raise ConfigError(
            "attn_implementation='trilevel' got a mask function of the model's or user's own (or_mask_function, "
            f"and_mask_function); it knows padding and windows only: {_OTHERWISE}"
        )
    # the makers of causal masks know no such argument; False is for masks that the model goes on to combine
    if not allow_is_bidirectional_skip:
        raise ConfigError(
            "attn_implementation='trilevel' runs encoders, whose tokens see both sides; this model asked for a causal "
            f"mask, or for one to combine with another: {_OTHERWISE}"
        )
    if q_length != kv_length:
        raise ShapeError(
            f"attn_implementation='trilevel' is self-attention over one input, got {q_length} queries and a mask or "
            f"keys for {kv_length} tokens. Pass attention_mask of shape ({batch_size}, {q_length}), no cache and no "
            f"prefix; else {_OTHERWISE}"
        )
    if attention_mask is not None and tuple(attention_mask.shape) != (batch_size, kv_length):
        raise ShapeError(
            f"attention_mask must be (batch, tokens) = ({batch_size}, {kv_length}), got "
            f"{tuple(attention_mask.shape)}. Pass the tokenizer's attention_mask; for any other mask {_OTHERWISE}"
        )
    if torch.compiler.is_compiling():
        # neither look at values there: a graph serves every input
        return TokenMask(attention_mask, local_size)
    _check_pattern(mask_function, q_length, local_size)
    is_plain = attention_mask is None or bool(attention_mask.all())
    return TokenMask(None if is_plain else attention_mask, local_size)


def _check_pattern(mask_function: Callable[..., Any], tokens: int, radius: int | None) -> None:
    """Ask the model's own rule at its edges, so that no pattern is taken for another."""
    far = tokens - 1 if radius is None else min(radius, tokens - 1)
    pairs = [(0, far, True), (far, 0, True)]
    if radius is not None and radius + 1 < tokens:
        pairs += [(0, radius + 1, False), (radius + 1, 0, False)]
    query, key, wanted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    zero = torch.zeros_like(query)
    if not torch.equal(torch.as_tensor(mask_function(zero, zero, query, key)).expand_as(wanted), wanted):
        raise ConfigError(
            "attn_implementation='trilevel' runs full attention and windows to both sides; this model's mask over "
            f"{tokens} tokens (local_size={radius}) is neither: {_OTHERWISE}"
        )
