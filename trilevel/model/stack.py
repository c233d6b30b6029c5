"""A stack of blocks and a final norm: the encoder without its embedding, also used over sentence vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trilevel.errors import ConfigError, ShapeError
from trilevel.model.block import Block, init_weights
from trilevel.model.config import (
    LayerCounts,
    LayerLevels,
    LayerThetas,
    block_sizes,
    check_blocks,
    layer_counts,
    layer_levels,
    layer_thetas,
)
from trilevel.model.ffn import Activation
from trilevel.model.focus import Compact, Focus, UnitScorer, check_fraction, pass_gradient, tokens_of, top_units
from trilevel.model.pool import check_unit_ids
from trilevel.model.positions import places_in_segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What a forward pass did beside its output.

    Attributes:
        hidden: (batch, tokens, dim), the output.
        unit_scores: (batch, units), the scorer's, -inf for a unit without tokens; None without focus. A loss on them
            teaches the scorer.
        kept_units: (batch, units) bool, the units that passed the deep blocks; None when all tokens did.
        kept_tokens: (batch, kept) int, where the tokens of the deep blocks stand, -1 at padding; None when all passed.
        explanations: with `explain=True` what each attention layer reports, in order; indices in the blocks behind the
            focus point into `kept_tokens`.
    """

    hidden: Tensor
    unit_scores: Tensor | None = None
    kept_units: Tensor | None = None
    kept_tokens: Tensor | None = None
    explanations: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    # what is known about each token besides its state
    padding_mask: Tensor | None
    segment_ids: Tensor | None
    num_segments: int | None
    positions: Tensor | None
    global_prior: Tensor | None
    global_forced: Tensor | None

    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def compacted(self, compact: Compact, shape: torch.Size) -> _Tokens:
        positions = self.positions
        if positions is None:
            positions = torch.arange(shape[1], device=compact.index.device).expand(shape[0], -1)
        return replace(
            self,
            padding_mask=compact.padding_mask,
            segment_ids=None if self.segment_ids is None else compact.gather_segments(self.segment_ids),
            # rotary angles keep the distances of the whole text
            positions=compact.gather(positions),
            global_prior=None if self.global_prior is None else compact.gather(self.global_prior),
            global_forced=None if self.global_forced is None else compact.gather(self.global_forced),
        )


class BlockStack(nn.Module):
    """Blocks and a final norm; the arguments mean what they do in `EncoderConfig`.

    Args:
        dim: width of the residual stream.
        num_heads: attention heads, as many in every block or a tuple with one entry for each.
        num_layers: blocks.
        levels: what the heads see: one `Levels` for all, a tuple with one for each block, None for dense attention.
        num_kv_heads: key and value heads, for all or a tuple with one for each block; default `num_heads`.
        head_dim: width of a head; default `dim // num_heads`, needed if blocks differ in their heads.
        num_dense_heads: heads that see everything beside those with levels, for all or a tuple with one for each block.
        ffn_dim: width inside the feed-forward part, for all or a tuple with one for each block; default `4 * dim`.
        rope_theta: base of the rotary positions, one for all or a tuple with one for each block; None for none.
        dropout: on what each part adds.
        norm_eps: epsilon of the layer norms.
        is_causal: a token sees no later token.
        norm_first: norms before the parts of a block, else behind the sums.
        has_first_norm: a norm before the first attention.
        has_final_norm: a norm behind the last block.
        bias: biases in the linear maps.
        norm_bias: biases in the norms.
        activation: of the feed-forward parts.
        is_gated: gated feed-forward parts.
        focus: send only the most important units through the blocks after `focus.after_layer`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: LayerCounts,
        num_layers: int,
        levels: LayerLevels,
        *,
        num_kv_heads: LayerCounts | None = None,
        head_dim: int | None = None,
        num_dense_heads: LayerCounts = 0,
        ffn_dim: LayerCounts | None = None,
        rope_theta: LayerThetas = 10_000.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
        is_causal: bool = False,
        norm_first: bool = True,
        has_first_norm: bool = True,
        has_final_norm: bool = True,
        bias: bool = True,
        norm_bias: bool = True,
        activation: Activation = "gelu",
        is_gated: bool = False,
        focus: Focus | None = None,
    ) -> None:
        super().__init__()
        check_blocks(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_layers=num_layers,
            ffn_dim=ffn_dim,
            rope_theta=rope_theta,
            dropout=dropout,
            focus=focus,
            is_causal=is_causal,
            activation=activation,
            norm_first=norm_first,
            has_first_norm=has_first_norm,
        )
        self.dim = dim
        self.focus = focus
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                levels=block_levels,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                num_dense_heads=dense_heads,
                ffn_dim=width,
                rope_theta=theta,
                dropout=dropout,
                norm_eps=norm_eps,
                is_causal=is_causal,
                norm_first=norm_first,
                has_attention_norm=has_first_norm or index > 0,
                bias=bias,
                norm_bias=norm_bias,
                activation=activation,
                is_gated=is_gated,
            )
            for index, (block_levels, theta, dense_heads, (heads, kv_heads, width)) in enumerate(
                zip(
                    layer_levels(levels, num_layers),
                    layer_thetas(rope_theta, num_layers),
                    layer_counts(num_dense_heads, num_layers, "num_dense_heads"),
                    block_sizes(dim, num_heads, num_kv_heads, ffn_dim, num_layers),
                    strict=True,
                )
            )
        )
        self.unit_scorer = None if focus is None else UnitScorer(dim, norm_eps=norm_eps)
        self.final_norm = nn.LayerNorm(dim, eps=norm_eps, bias=norm_bias) if has_final_norm else nn.Identity()
        init_weights(self, num_layers=num_layers)

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
        unit_ids: Tensor | None = None,
        num_units: int | None = None,
        focus_fraction: float | None = None,
        return_details: bool = False,
        explain: bool = False,
    ) -> Tensor | Details:
        """Map `(batch, tokens, dim)` to the same shape.

        Without gradients the feed-forward parts run over 4,096 tokens at a time, so memory is that of the attention.

        Args:
            x: (batch, tokens, dim).
            padding_mask: (batch, tokens) bool, true at padding.
            segment_ids: (batch, tokens) int, non-decreasing: tokens see their own segment only.
            num_segments: segments at most, when known.
            positions: (batch, tokens) int for the rotary positions; default the place in the segment, so that packed
                inputs give what they give alone.
            global_prior: (batch, tokens), added to the score by which global tokens are chosen.
            global_forced: (batch, tokens) bool, tokens that are global in any case.
            unit_ids: (batch, tokens) int, the unit (say sentence) a token is in, negative for none; needed for focus.
                A token of no unit keeps the state it has at the focus.
            num_units: units, above every id; default the largest id + 1.
            focus_fraction: share of the units that pass the deep blocks; None takes the configured one, 1.0 all.
            return_details: return `Details` instead of the tensor.
            explain: as `return_details`, with the report of every attention layer.

        Raises:
            ConfigError: a fraction below 1 and no focus configured.
            ShapeError: focus without `unit_ids`, or a wrong shape.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x has shape {tuple(x.shape)}; (batch, tokens, {self.dim}) is needed.")
        if positions is None and segment_ids is not None:
            positions = places_in_segments(segment_ids)
        tokens = _Tokens(
            padding_mask=padding_mask,
            segment_ids=segment_ids,
            num_segments=num_segments,
            positions=positions,
            global_prior=global_prior,
            global_forced=global_forced,
        )
        report: list[Any] | None = [] if explain else None
        fraction = self._fraction(focus_fraction)
        if self.focus is None or (fraction == 1.0 and not (return_details or torch.is_grad_enabled())):
            details = Details(hidden=_run(self.blocks, x, tokens, report))
        else:
            details = self._focused(self.focus, x, tokens, unit_ids, num_units, fraction, report)
        hidden = self.final_norm(details.hidden)
        if not (return_details or explain):
            return hidden  # type: ignore[no-any-return]
        return replace(details, hidden=hidden, explanations=tuple(report or ()))

    def run(
        self, x: Tensor, first: int, last: int, *, padding_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Blocks `first` to before `last` over `x` (batch, tokens, dim), without the final norm and without focus."""
        tokens = _Tokens(
            padding_mask=padding_mask,
            segment_ids=None,
            num_segments=None,
            positions=positions,
            global_prior=None,
            global_forced=None,
        )
        return _run(self.blocks[first:last], x, tokens, None)

    def _fraction(self, given: float | None) -> float:
        if given is not None:
            check_fraction(given, "focus_fraction")
        if self.focus is None and given is not None and given < 1.0:
            raise ConfigError(
                f"focus_fraction={given}: the model has no focus. Build it with focus=Focus(after_layer=...)."
            )
        if self.focus is None:
            return 1.0
        return self.focus.fraction if given is None else given

    def _focused(
        self,
        focus: Focus,
        x: Tensor,
        tokens: _Tokens,
        unit_ids: Tensor | None,
        num_units: int | None,
        fraction: float,
        report: list[Any] | None,
    ) -> Details:
        if unit_ids is None:
            raise ShapeError(
                "the model has a focus and needs unit_ids (batch, tokens), the unit (say sentence) of each token."
            )
        check_unit_ids(x, unit_ids)
        assert self.unit_scorer is not None
        shallow = _run(self.blocks[: focus.after_layer], x, tokens, report)
        scores = self.unit_scorer(shallow, unit_ids, num_units=num_units, padding_mask=tokens.padding_mask)
        deep_blocks = self.blocks[focus.after_layer :]
        if fraction == 1.0:
            return Details(hidden=_run(deep_blocks, shallow, tokens, report), unit_scores=scores)
        keep_units = top_units(scores.detach(), fraction)
        compact = Compact.of(tokens_of(keep_units, unit_ids, tokens.padding_mask))
        start = compact.gather(shallow)
        deep = _run(deep_blocks, start, tokens.compacted(compact, shallow.shape), report)
        if torch.is_grad_enabled():
            own = scores.gather(1, compact.gather(unit_ids).clamp(min=0))
            deep = pass_gradient(deep, start, own.masked_fill(compact.padding_mask, 0.0))
        return Details(
            hidden=compact.scatter(deep, shallow),
            unit_scores=scores,
            kept_units=keep_units,
            kept_tokens=compact.index.masked_fill(compact.padding_mask, -1),
        )


def _run(blocks: nn.ModuleList, x: Tensor, tokens: _Tokens, report: list[Any] | None) -> Tensor:
    arguments = tokens.arguments()
    for block in blocks:
        if report is None:
            x = block(x, **arguments)
        else:
            x, explanation = block(x, **arguments, explain=True)
            report.append(explanation)
    return x
