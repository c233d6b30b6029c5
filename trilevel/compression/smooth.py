"""SmoothQuant: the size of single features moves from activations, which have outliers, into weights, which have none.

Xiao et al. 2022, arXiv 2211.10438. Feature j of a linear map's input is divided by
s_j = a_j ** alpha / w_j ** (1 - alpha), a_j and w_j its largest absolute activation and weight, and its weights are
multiplied by s_j: the function stays.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.model.block import Block
from trilevel.model.ffn import FeedForward


@torch.no_grad()
def smooth(model: nn.Module, linears: Mapping[nn.Linear, Tensor], alpha: float) -> dict[nn.Linear, Tensor]:
    """Smooth the inputs of `linears` in place.

    The division is folded into what computes the input where nothing else reads it: the norm of a pre-norm block, the
    value rows of `in_proj` for `out_proj`, the ungated half of a gated `up` for `down`.

    Args:
        model: the model, changed.
        linears: maps to smooth, each with the largest absolute value of each of its input features, `(in_features,)`.
        alpha: 0 leaves all to the activations, 1 to the weights.

    Returns:
        For each map whose division could not be folded what its input must be multiplied by from now on,
        `(in_features,)`.
    """
    folded: set[nn.Linear] = set()
    for module in model.modules():
        # first what is scaled inside: it changes the rows of the maps that read the norms
        if isinstance(module, MultiLevelAttention) and module.out_proj in linears:
            _fold_values(module, linears[module.out_proj], alpha)
            folded.add(module.out_proj)
        elif isinstance(module, FeedForward) and module.is_gated and module.down in linears:
            scale = _scale(linears[module.down], module.down.weight, alpha)
            _divide_rows(module.up, slice(module.down.in_features, None), scale)
            module.down.weight *= scale
            folded.add(module.down)
    for module in model.modules():
        if not isinstance(module, Block) or not module.norm_first:
            continue
        attention, ffn = module.attention, module.ffn
        if isinstance(module.attention_norm, nn.LayerNorm) and attention.in_proj in linears:
            scale = _scale(linears[attention.in_proj], attention.in_proj.weight, alpha)
            readers = [attention.in_proj, *(getattr(attention, name, None) for name in ("scorer", "region_gate"))]
            _fold_norm(module.attention_norm, [part for part in readers if part is not None], scale)
            folded.add(attention.in_proj)
        if ffn.up in linears:
            scale = _scale(linears[ffn.up], ffn.up.weight, alpha)
            _fold_norm(module.ffn_norm, [ffn.up], scale)
            folded.add(ffn.up)
    left: dict[nn.Linear, Tensor] = {}
    for linear, largest in linears.items():
        if linear not in folded:
            scale = _scale(largest, linear.weight, alpha)
            linear.weight *= scale
            left[linear] = 1 / scale
    return left


def _scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """The divisor s of each input feature; 1 where either is zero."""
    largest = weight.abs().amax(0)
    scale = activation.to(weight.dtype) ** alpha / largest ** (1 - alpha)
    return torch.where((activation > 0) & (largest > 0), scale, 1).clamp(1e-4, 1e4)


def _fold_norm(norm: nn.LayerNorm, readers: list[nn.Linear], scale: Tensor) -> None:
    norm.weight.div_(scale)
    if norm.bias is not None:
        norm.bias.div_(scale)
    for reader in readers:
        reader.weight *= scale


def _fold_values(attention: MultiLevelAttention, largest: Tensor, alpha: float) -> None:
    """A head's output is linear in its values, feature by feature; heads of a group share them and so the scale."""
    groups, dim = attention.num_kv_heads, attention.head_dim
    repeats = attention.num_heads // groups

    def shared(of_heads: Tensor) -> Tensor:
        return of_heads.view(groups, repeats, dim).amax(1).flatten()

    weight = attention.out_proj.weight
    # one row of the largest weights is all that the rule reads
    scale = _scale(shared(largest), shared(weight.abs().amax(0))[None], alpha)
    _divide_rows(attention.in_proj, slice(attention.in_proj.out_features - groups * dim, None), scale)
    weight *= scale.view(groups, 1, dim).expand(-1, repeats, -1).flatten()


def _divide_rows(linear: nn.Linear, rows: slice, scale: Tensor) -> None:
    linear.weight[rows] /= scale[:, None]
    if linear.bias is not None:
        linear.bias[rows] /= scale
