"""Linear maps and tables in 8 or 4 bits: float masters that round as they run, and the stored integers they become."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trilevel.compression.fake_quantize import (
    LARGEST_FACTOR,
    dequantize,
    dequantize_4bit,
    fake_quantize,
    linear_4bit,
    pack_4bit,
    quantize_tensor,
    unpack_int8,
)
from trilevel.compression.observers import LIMITS, Grid, grid_of

WEIGHT_LIMITS = {8: (-127, 127), 4: (-8, 7)}
CLIPS_4BIT = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's largest weight that the search for its scale tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGrid:
    """How a linear map rounds what it reads: `low..high` on an integer grid."""

    grid: Grid
    low: float
    high: float

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale in the type of `like`, and the zero point in the type of the grid."""
        scale, zero = grid_of(self.low, self.high, self.grid)
        kind = torch.int8 if self.grid == "int8" else torch.uint8
        return like.new_tensor(scale), torch.tensor(zero, dtype=kind, device=like.device)


class Reads(nn.Module):
    """What both kinds of linear map do to their input: an optional factor for each feature, then rounding."""

    input_multiplier: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, multiplier: Tensor | None, scale: Tensor | None, zero_point: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("input_multiplier", multiplier)
        # a logarithm when it is learned: one learning rate then suits scales of every size
        if isinstance(scale, nn.Parameter):
            self.input_scale = scale
        else:
            self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", zero_point)

    @property
    def is_learned(self) -> bool:
        """Whether the scale is a parameter, kept as its logarithm."""
        return isinstance(self.input_scale, nn.Parameter)

    def scale(self) -> Tensor | None:
        """The step of the grid; None if the input is not rounded."""
        if self.input_scale is None:
            return None
        return self.input_scale.exp() if self.is_learned else self.input_scale

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        if self.input_multiplier is not None:
            x = x * self.input_multiplier.to(x.dtype)
        scale = self.scale()
        if scale is None or self.input_zero_point is None:
            return x
        smallest, largest = LIMITS["int8" if self.input_zero_point.dtype == torch.int8 else "uint8"]
        return fake_quantize(x, scale, self.input_zero_point, smallest, largest)

    def fixed(self) -> Reads:
        """A copy with nothing to learn."""
        parts = (self.input_multiplier, self.scale(), self.input_zero_point)
        return Reads(*(None if part is None else part.detach().clone() for part in parts))

    def extra_repr(self) -> str:
        """The grid."""
        kind = "float" if self.input_zero_point is None else str(self.input_zero_point.dtype).removeprefix("torch.")
        return f"{kind}, has_multiplier={self.input_multiplier is not None}"


class QuantizedLinear(nn.Linear):
    """A linear map that rounds its weight and, with an `InputGrid`, its input whenever it runs; the bias stays float.

    8 bits: a scale for each output, -127..127. 4 bits: a scale for each group of inputs of each output, -8..7.

    Where the input is rounded as well, products are summed in integers, so that an output has one scale. Weights of 4
    bits then have a whole number of 1 to 8 for each group beside it, and times that they are integers of 8 bits
    (Lin et al. 2024, arXiv 2405.04532): stored in half the bytes and computed with at full speed.

    The weights of inputs 2k and 2k + 1 are then at most 128 together: x86 processors without integer dot products
    (VNNI) add the products of such a pair in 16 bits and cut the sum off, without a word (255 x 128 < 2**15). Training
    keeps to it, for the scale of 8 bits grows with the weights (decision 0014).

    `weight` stays a float parameter, the master that training moves (straight-through gradients). Made by `of`.
    """

    bits: int
    group_size: int
    reads: Reads
    weight_scale: Tensor

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        *,
        bits: int = 8,
        group_size: int = 32,
        reads: InputGrid | None = None,
        multiplier: Tensor | None = None,
        is_learned: bool = False,
    ) -> QuantizedLinear:
        """Take over the parameters of `linear`.

        Args:
            linear: the map; its weight is already divided by `multiplier`.
            bits: 8 or 4.
            group_size: inputs that share a scale, for 4 bits.
            reads: how the input is rounded; None leaves it float.
            multiplier: `(in_features,)`, what the input is multiplied by before; None for nothing.
            is_learned: scales of input and weight are parameters.
        """
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        made.bits, made.group_size = bits, group_size if bits == 4 else 0
        weight = linear.weight.detach()
        if bits == 8:
            scale = _scale_8bit(weight)
        else:
            scale = (_scale_4bit if reads is None else _scale_4bit_factored)(_groups(weight, group_size))
        input_scale, zero_point = (None, None) if reads is None else reads.tensors(weight)
        if is_learned:
            made.weight_log_scale = nn.Parameter(scale.log())
            input_scale = None if input_scale is None else nn.Parameter(input_scale.log())
        else:
            made.register_buffer("weight_scale", scale)
        made.reads = Reads(multiplier, input_scale, zero_point)
        return made.train(linear.training)

    def scale(self) -> Tensor:
        """`(out,)` for 8 bits, `(out, groups)` for 4."""
        learned: Tensor | None = getattr(self, "weight_log_scale", None)
        scale = self.weight_scale if learned is None else learned.exp()
        if self.reads.input_scale is None:
            return scale
        if self.bits == 8:
            return torch.maximum(scale, _scale_of_pairs(self.weight.detach()))
        unit, factors = _factored(scale)
        return unit[:, None] * factors

    def rounded_weight(self) -> Tensor:
        """What the weight counts for, `(out, in)`."""
        zero = torch.zeros((), dtype=torch.int8, device=self.weight.device)
        smallest, largest = WEIGHT_LIMITS[self.bits]
        if self.bits == 8:
            return fake_quantize(self.weight, self.scale(), zero, smallest, largest, axis=0)
        groups = _groups(self.weight, self.group_size)
        rounded = fake_quantize(groups.flatten(0, 1), self.scale().flatten(), zero, smallest, largest, axis=0)
        return rounded.view(groups.shape).flatten(1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return F.linear(self.reads(x), self.rounded_weight(), self.bias)

    @torch.no_grad()
    def frozen(self) -> FrozenLinear | FrozenLinear4bit:
        """The same map with its integers stored."""
        zero = torch.zeros((), dtype=torch.int8, device=self.weight.device)
        smallest, largest = WEIGHT_LIMITS[self.bits]
        scale = self.scale().detach().clone()
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        if self.bits == 8:
            q = quantize_tensor(self.weight, scale, zero, smallest, largest, axis=0).to(torch.int8)
            return FrozenLinear(q, scale, bias, self.reads.fixed()).train(self.training)
        groups = _groups(self.weight, self.group_size)
        q = quantize_tensor(groups.flatten(0, 1), scale.flatten(), zero, smallest, largest, axis=0)
        packed = pack_4bit(q.view(groups.shape))
        if self.reads.input_scale is None:
            return FrozenLinear4bit(packed, scale, bias, self.reads.fixed(), self.in_features).train(self.training)
        unit, factors = _factored(scale)
        made = FrozenLinear8bitOf4(packed, factors.byte(), unit, bias, self.reads.fixed(), self.in_features)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return f"{super().extra_repr()}, bits={self.bits}" + (f", group_size={self.group_size}" * (self.bits == 4))


class QuantizedEmbedding(nn.Embedding):
    """A table whose rows are rounded as they are read; zero rows stay zero.

    8 bits: a scale for each row. 4 bits: a scale for each group of features of each row.
    """

    bits: int
    group_size: int
    row_scale: Tensor

    @classmethod
    def of(cls, embedding: nn.Embedding, *, bits: int = 8, group_size: int = 32) -> QuantizedEmbedding:
        """Take over the table of `embedding`."""
        made = cls(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        made.padding_idx, made.weight = embedding.padding_idx, embedding.weight
        made.bits, made.group_size = bits, group_size if bits == 4 else 0
        table = embedding.weight.detach()
        made.register_buffer("row_scale", _scale_8bit(table) if bits == 8 else _scale_4bit(_groups(table, group_size)))
        return made.train(embedding.training)

    def forward(self, x: Tensor) -> Tensor:
        """Ids of any shape to `(..., dim)`."""
        rows = F.embedding(x, self.weight, self.padding_idx).flatten(0, -2)
        zero = torch.zeros((), dtype=torch.int8, device=rows.device)
        scale = self.row_scale[x.flatten()]
        if self.bits == 4:
            groups = _groups(rows, self.group_size)
            flat = fake_quantize(groups.flatten(0, 1), scale.flatten(), zero, *WEIGHT_LIMITS[4], axis=0)
            rounded = flat.view(groups.shape).flatten(1)[:, : self.embedding_dim]
        else:
            rounded = fake_quantize(rows, scale, zero, *WEIGHT_LIMITS[8], axis=0)
        return rounded.reshape(*x.shape, self.embedding_dim)

    @torch.no_grad()
    def frozen(self) -> FrozenEmbedding | FrozenEmbedding4bit:
        """The same table with its integers stored."""
        zero = torch.zeros((), dtype=torch.int8, device=self.weight.device)
        scale = self.row_scale.clone()
        if self.bits == 8:
            q = quantize_tensor(self.weight, scale, zero, *WEIGHT_LIMITS[8], axis=0).to(torch.int8)
            return FrozenEmbedding(q, scale, self.padding_idx).train(self.training)
        groups = _groups(self.weight, self.group_size)
        q = quantize_tensor(groups.flatten(0, 1), scale.flatten(), zero, *WEIGHT_LIMITS[4], axis=0)
        packed = pack_4bit(q.view(groups.shape)).flatten(1)
        return FrozenEmbedding4bit(packed, scale, self.padding_idx, self.embedding_dim).train(self.training)


# subclasses, so that what looks for linear maps and tables finds them; their parameters are properties and buffers


def _hold(
    linear: nn.Linear, out_features: int, in_features: int, bias: nn.Parameter | None, reads: Reads, **stored: Tensor
) -> None:
    """Set up a linear map whose weight is buffers."""
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = out_features, in_features
    for name, tensor in stored.items():
        linear.register_buffer(name, tensor)
    linear.register_parameter("bias", bias)
    linear.reads = reads


class FrozenLinear(nn.Linear):
    """A linear map with a stored int8 weight `(out, in)` and a scale for each output."""

    weight_int8: Tensor
    weight_scale: Tensor
    reads: Reads

    def __init__(self, weight_int8: Tensor, weight_scale: Tensor, bias: nn.Parameter | None, reads: Reads) -> None:
        rows, columns = weight_int8.shape
        _hold(self, rows, columns, bias, reads, weight_int8=weight_int8, weight_scale=weight_scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed, not stored
        """The weight in floating point."""
        return dequantize(self.weight_int8, self.weight_scale, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return F.linear(self.reads(x), self.weight, self.bias)


class FrozenLinear8bitOf4(FrozenLinear):
    """A linear map that computes with weights of 8 bits, stored in 4: see `QuantizedLinear`.

    `packed` as in `FrozenLinear4bit`, `weight_factors` uint8 `(out, groups)` and a scale for each output.
    """

    packed: Tensor
    weight_factors: Tensor

    def __init__(
        self,
        packed: Tensor,
        factors: Tensor,
        weight_scale: Tensor,
        bias: nn.Parameter | None,
        reads: Reads,
        in_features: int,
    ) -> None:
        stored = {"packed": packed, "weight_factors": factors, "weight_scale": weight_scale}
        _hold(self, packed.shape[0], in_features, bias, reads, **stored)

    @property
    def weight_int8(self) -> Tensor:  # type: ignore[override]  # computed, not stored
        """The integers of 8 bits, `(out, in)`."""
        q = unpack_int8(self.packed, self.weight_factors)
        return q if q.shape[1] == self.in_features else q[:, : self.in_features]


class FrozenLinear4bit(nn.Linear):
    """A linear map with a stored weight of 4 bits, uint8 `(out, groups, group_size / 2)`, see `pack_4bit`."""

    packed: Tensor
    weight_scale: Tensor
    reads: Reads

    def __init__(
        self, packed: Tensor, weight_scale: Tensor, bias: nn.Parameter | None, reads: Reads, in_features: int
    ) -> None:
        _hold(self, packed.shape[0], in_features, bias, reads, packed=packed, weight_scale=weight_scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed, not stored
        """The weight in floating point."""
        return dequantize_4bit(self.packed, self.weight_scale, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return linear_4bit(self.reads(x), self.packed, self.weight_scale, self.bias)


class FrozenEmbedding(nn.Embedding):
    """A table of stored int8 rows `(num_embeddings, dim)`, each with its own scale."""

    weight_int8: Tensor
    row_scale: Tensor

    def __init__(self, weight_int8: Tensor, row_scale: Tensor, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight_int8.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.register_buffer("weight_int8", weight_int8)
        self.register_buffer("row_scale", row_scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed, not stored
        """The table in floating point."""
        return dequantize(self.weight_int8, self.row_scale, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        """Ids of any shape to `(..., dim)`; only the rows that are read are made float."""
        # the integers themselves are float after this operator, the scale of each row follows
        rows = dequantize(F.embedding(x, self.weight_int8), self.row_scale.new_ones(()))
        values: Tensor = rows * F.embedding(x, self.row_scale[:, None])
        return values


class FrozenEmbedding4bit(nn.Embedding):
    """A table of stored 4-bit rows, uint8 `(num_embeddings, padded_dim / 2)`, and a scale for each group of features.

    Bytes as `pack_4bit` packs them; arithmetic that every runtime has takes them apart.
    """

    packed: Tensor
    row_scale: Tensor

    def __init__(self, packed: Tensor, row_scale: Tensor, padding_idx: int | None, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = packed.shape[0], embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.register_buffer("packed", packed)
        self.register_buffer("row_scale", row_scale)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed, not stored
        """The table in floating point."""
        return self._values(self.packed, self.row_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Ids of any shape to `(..., dim)`; only the rows that are read are made float."""
        return self._values(F.embedding(x, self.packed), F.embedding(x, self.row_scale))

    def _values(self, packed: Tensor, scale: Tensor) -> Tensor:
        both = packed.to(scale.dtype)
        high = torch.floor(both / 16)
        values = torch.stack([both - 16 * high, high], -1).flatten(-2) + WEIGHT_LIMITS[4][0]
        grouped: Tensor = values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]
        return grouped.flatten(-2)[..., : self.embedding_dim]


def _scale_8bit(weight: Tensor) -> Tensor:
    """A scale for each row, 1 where the row is zero."""
    largest = weight.abs().amax(1)
    scale: Tensor = torch.where(largest > 0, largest / WEIGHT_LIMITS[8][1], 1)
    return scale


def _scale_of_pairs(weight: Tensor) -> Tensor:
    """The smallest scale of each row at which no two neighbours round to integers of more than 128 together."""
    # rounding adds one half each
    return _groups(weight.abs(), 2).sum(2).amax(1) / 127


def _groups(weight: Tensor, group_size: int) -> Tensor:
    """`(out, in)` as `(out, groups, group_size)`, zeros behind the last input."""
    padded = F.pad(weight, (0, -weight.shape[1] % group_size))
    return padded.view(weight.shape[0], -1, group_size)


def _scale_4bit(groups: Tensor) -> Tensor:
    """The scale of each group that rounds it with the smallest squared error, among `CLIPS_4BIT`."""
    top = groups.abs().amax(2)
    return _best(groups, [torch.where(top > 0, clip * top / WEIGHT_LIMITS[4][1], 1) for clip in CLIPS_4BIT])


def _scale_4bit_factored(groups: Tensor) -> Tensor:
    """The same, all scales of an output whole multiples of an eighth of its largest."""
    scale = torch.where(groups.abs().amax(2) > 0, _scale_4bit(groups), 0)
    top = scale.amax(1, keepdim=True)
    top = torch.where(top > 0, top, 1).bfloat16().to(scale.dtype)
    best = _best(groups, [top / LARGEST_FACTOR * factor for factor in range(1, LARGEST_FACTOR + 1)])
    # the largest stays: others are measured by it
    return torch.where(scale < scale.amax(1, keepdim=True), best, top)


def _factored(scale: Tensor) -> tuple[Tensor, Tensor]:
    """A unit for each output `(out,)`, and the whole number of units that is nearest to each scale `(out, groups)`.

    What was made of both comes back as it was. The gradient is that of the largest scale of each output.
    """
    largest = scale.amax(1)
    # bfloat16 has so few digits that times a factor it is exact; its gradient passes
    unit = largest.bfloat16().to(scale.dtype) / LARGEST_FACTOR
    return unit, (scale.detach() / unit.detach()[:, None]).round().clamp(1, LARGEST_FACTOR)


def _best(groups: Tensor, tried: list[Tensor]) -> Tensor:
    """Of several scales `(out, groups)` those that round each group with the smallest squared error."""
    smallest, largest = WEIGHT_LIMITS[4]
    errors = [
        ((groups / one[..., None]).round().clamp(smallest, largest) * one[..., None] - groups).square().sum(2)
        for one in tried
    ]
    best = torch.stack(errors).argmin(0)
    chosen: Tensor = torch.stack([one.expand(groups.shape[:2]) for one in tried]).gather(0, best[None]).squeeze(0)
    return chosen
