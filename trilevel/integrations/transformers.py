"""`attn_implementation="trilevel"` in Hugging Face transformers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trilevel.attention import LevelRatio, Levels, multi_level_attention
from trilevel.errors import ConfigError, ShapeError, require
from trilevel.integrations.token_mask import TokenMask, make_token_mask

LayerLevels = Callable[[int], Levels | None]

# arguments of other families that change what attention computes
_UNKNOWN = (
    "position_bias", "softcap", "s_aux", "cache", "block_table", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx",
)  # fmt: skip


def register(levels: Levels | LayerLevels | None = None, *, name: str = "trilevel") -> None:
    """Make `attn_implementation="trilevel"` known to transformers, for attention and for masks.

    `AutoModel.from_pretrained(path, attn_implementation="trilevel")`, `from_config(...)` and
    `model.set_attn_implementation("trilevel")` then work for BERT, MiniLM, RoBERTa, DistilBERT, ModernBERT, ViT and
    DeiT. Without `levels` it computes what `sdpa` does: full layers by torch's SDPA, sliding-window layers in time
    and memory linear in the tokens, and padding costs O(tokens). Registering a name again replaces what it runs, in
    models loaded before as well.

    Args:
        levels: None is exact. `Levels`, or a function of the layer's index that gives `Levels` or None, runs full
            layers as multi-level attention: an approximation without any training, to try levels out before
            `trilevel convert`. Regions are pooled by their plain mean, and global heads are refused, for no scorer
            has been learned. Layers with a sliding window keep it.
        name: the implementation's name, "trilevel" or one that begins so ("trilevel-regions"), so that exact and
            approximate models can live side by side.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: transformers is too old, or levels or name cannot be used.

    >>> from trilevel import LevelRatio, Levels
    >>> register()
    >>> register(Levels(ratio=LevelRatio(6, 3, 0), window=129, region_size=64), name="trilevel-regions")
    """
    modeling = require("transformers.modeling_utils", extra="transformers")
    masking = require("transformers.masking_utils", extra="transformers")
    if "q_length" not in inspect.signature(masking.sdpa_mask).parameters:
        raise ConfigError(
            "this transformers hands its mask functions other arguments than version 5 does. "
            "Install a newer one: pip install -U transformers."
        )
    # transformers reads meaning into these words inside a name
    if not re.fullmatch(r"trilevel[a-z0-9_-]*", name) or re.search("flash|sdpa|flex", name):
        raise ConfigError(f"name={name!r} must be 'trilevel' or begin so, such as 'trilevel-regions'.")
    if isinstance(levels, Levels):
        _check_levels(levels)
    elif levels is not None and not callable(levels):
        raise ConfigError(f"levels must be Levels, a function of the layer's index or None, got {levels!r}.")
    modeling.AttentionInterface.register(name, partial(_attend, registered_as=name, layer_levels=levels))
    masking.AttentionMaskInterface.register(name, make_token_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenMask | Tensor | None,
    *,
    registered_as: str,
    layer_levels: Levels | LayerLevels | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls: (batch, heads, tokens, dim) to (batch, tokens, heads, dim), and no weights."""
    _check_call(module, query, key, is_causal, kwargs)
    mask = _token_mask(attention_mask, registered_as, sliding_window)
    if mask.radius is not None:
        levels: Levels | None = Levels(ratio=LevelRatio(1, 0, 0), mode="strict", window=2 * mask.radius + 1)
    else:
        levels = _levels_of(module, layer_levels)
    if levels is not None and dropout > 0:
        raise ConfigError(
            f"attn_implementation={registered_as!r} has no dropout inside windows and levels, got dropout={dropout}. "
            "Train with attention_dropout=0.0 (BERT, RoBERTa, ViT: attention_probs_dropout_prob=0.0) in the config."
        )
    covers = mask.radius is not None and mask.radius >= query.shape[2] - 1
    if levels is None or covers:
        seen = None if mask.real is None else mask.real[:, None, None]
        out = scaled_dot_product_attention(
            query, key, value, seen, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        padding = None if mask.real is None else ~mask.real
        out = multi_level_attention(query, key, value, levels=levels, padding_mask=padding, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _check_call(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise ConfigError(
            "output_attentions=True needs the n x n weights, which attn_implementation='trilevel' never computes; "
            "load the model with attn_implementation='eager'."
        )
    # transformers' own rule: a layer that does not say is causal
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if is_causal or query.shape[2] != key.shape[2]:
        raise ConfigError(
            f"attn_implementation='trilevel' runs encoders' self-attention, got is_causal={is_causal}, "
            f"{query.shape[2]} queries and {key.shape[2]} keys in {type(module).__name__}; load the model with "
            "attn_implementation='sdpa'."
        )
    given = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if given:
        raise ConfigError(
            f"attn_implementation='trilevel' cannot honour {', '.join(given)} of {type(module).__name__}. Pass padded "
            "rows with an attention_mask in place of packed ones, or load the model with attn_implementation='sdpa'."
        )


def _token_mask(mask: TokenMask | Tensor | None, name: str, sliding_window: int | None) -> TokenMask:
    if isinstance(mask, TokenMask):
        return mask
    if mask is not None:
        raise ShapeError(
            f"attn_implementation={name!r} takes padding masks (batch, tokens) only, got a ready mask of shape "
            f"{tuple(mask.shape)}. Pass the model the tokenizer's attention_mask, or use attn_implementation='sdpa'."
        )
    masking = require("transformers.masking_utils", extra="transformers")
    if name not in masking.AttentionMaskInterface._global_mapping or sliding_window is not None:
        # transformers drops masks of implementations it has no mask function for
        raise ConfigError(
            f"no mask came with attn_implementation={name!r}: its mask function is not registered, or the layer was "
            "called by hand. Call trilevel.integrations.transformers.register() before the model runs, and the layer "
            "through its model."
        )
    return TokenMask(None, None)


def _levels_of(module: nn.Module, levels: Levels | LayerLevels | None) -> Levels | None:
    if levels is None or isinstance(levels, Levels):
        return levels
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise ConfigError(
            f"levels is a function of the layer's index, and {type(module).__name__} does not know its own. Pass one "
            "Levels for all layers, or set layer_idx on the model's attention modules."
        )
    found = levels(index)
    if found is not None:
        _check_levels(found)
    return found


def _check_levels(levels: Levels) -> None:
    if levels.ratio.global_ > 0:
        raise ConfigError(
            f"{levels.ratio} has global heads, and nothing has learned which tokens are global. Use a ratio without "
            "them, such as LevelRatio(6, 3, 0), or fit a scorer with `trilevel convert`."
        )
