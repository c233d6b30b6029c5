"""What an encoder is made of, as a value that goes to JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.errors import ConfigError
from trilevel.model.ffn import Activation, check_activation
from trilevel.model.focus import Focus
from trilevel.model.patches import Patches

LayerLevels = Levels | None | tuple[Levels | None, ...]
LayerThetas = float | None | tuple[float | None, ...]
LayerCounts = int | tuple[int, ...]
Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """An encoder: an embedding and a stack of blocks.

    The defaults are pre-norm blocks with rotary positions. Post-norm blocks over learned positions, token types and an
    embedding norm make a BERT; gated blocks without biases, their first norm left out, a ModernBERT; `patches` a ViT.

    Args:
        vocab_size: tokens in the vocabulary; None for an encoder of images (`patches`).
        dim: width of the residual stream, a multiple of `num_heads` unless `head_dim` is given.
        num_heads: attention heads, as many in every block or a tuple with one entry for each (a pruned encoder).
        num_layers: blocks.
        levels: what the heads see: one `Levels` for every block, a tuple with one for each, None for dense attention.
        num_kv_heads: key and value heads (GQA), the same in every block or a tuple with one entry for each; default
            `num_heads`.
        head_dim: width of a head; default `dim // num_heads`. It is needed if blocks differ in their heads, and lets
            `num_heads * head_dim` differ from `dim`.
        num_dense_heads: heads that see everything beside those with levels, the same in every block or a tuple with
            one for each.
        ffn_dim: width inside the feed-forward part, the same in every block or a tuple with one entry for each; default
            `4 * dim`.
        rope_theta: base of the rotary positions, one for every block or a tuple with one for each; None for none.
        dropout: after the embedding and after both parts of a block.
        norm_eps: epsilon of the layer norms.
        is_causal: a token sees no later token.
        padding_id: token whose embedding stays zero; None if every token is learned. It is not a mask: say what is
            padding with `padding_mask`.
        focus: thin the text out between blocks; None sends every token through all of them.
        max_tokens: longest input accepted.
        norm_first: norms before attention and feed-forward part (pre-norm); False puts them behind the sums.
        has_first_norm: False leaves the first block without norm before its attention (pre-norm only).
        has_final_norm: a norm behind the last block.
        bias: biases in the linear maps of the blocks.
        norm_bias: biases in the norms.
        activation: of the feed-forward parts: `gelu`, `gelu_tanh`, `relu` or `silu`.
        is_gated: gated feed-forward parts (GeGLU for `gelu`).
        num_positions: rows of a table of learned absolute positions; None for none. Position i reads row
            `i % num_positions`, so that inputs longer than the table repeat it (Longformer, arXiv 2004.05150).
        positions_skip_padding: positions count the real tokens only (RoBERTa), not the places in the row.
        num_token_types: rows of a table of token types (BERT's segments); None for none.
        has_embedding_norm: a norm behind the embedding.
        patches: image patches in place of tokens.
    """

    vocab_size: int | None
    dim: int
    num_heads: LayerCounts
    num_layers: int
    levels: LayerLevels
    num_kv_heads: LayerCounts | None = None
    head_dim: int | None = None
    num_dense_heads: LayerCounts = 0
    ffn_dim: LayerCounts | None = None
    rope_theta: LayerThetas = 10_000.0
    dropout: float = 0.0
    norm_eps: float = 1e-5
    is_causal: bool = False
    padding_id: int | None = 0
    focus: Focus | None = None
    max_tokens: int = 65_536
    norm_first: bool = True
    has_first_norm: bool = True
    has_final_norm: bool = True
    bias: bool = True
    norm_bias: bool = True
    activation: Activation = "gelu"
    is_gated: bool = False
    num_positions: int | None = None
    positions_skip_padding: bool = False
    num_token_types: int | None = None
    has_embedding_norm: bool = False
    patches: Patches | None = None

    def __post_init__(self) -> None:
        """Check what embedding and configuration know; the blocks check the rest."""
        for name in ("vocab_size", "max_tokens", "num_positions", "num_token_types"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"EncoderConfig: {name}={value} must be >= 1.")
        self._check_input()
        check_blocks(
            dim=self.dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            num_layers=self.num_layers,
            ffn_dim=self.ffn_dim,
            rope_theta=self.rope_theta,
            dropout=self.dropout,
            focus=self.focus,
            is_causal=self.is_causal,
            activation=self.activation,
            norm_first=self.norm_first,
            has_first_norm=self.has_first_norm,
        )
        layer_levels(self.levels, self.num_layers)
        layer_counts(self.num_dense_heads, self.num_layers, "num_dense_heads")

    def _check_input(self) -> None:
        if (self.vocab_size is None) == (self.patches is None):
            raise ConfigError(
                f"EncoderConfig: exactly one of vocab_size={self.vocab_size} and patches={self.patches} is needed, "
                "tokens or images; set the other to None."
            )
        if self.vocab_size is None:
            own = {"num_positions": self.num_positions, "num_token_types": self.num_token_types}
            for name, value in own.items():
                if value is not None:
                    raise ConfigError(f"EncoderConfig: {name}={value} belongs to tokens; patches have none, use None.")
        elif self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            raise ConfigError(
                f"EncoderConfig: padding_id={self.padding_id} is no token of a vocabulary of {self.vocab_size}; "
                "use None if there is no padding token."
            )

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types; `from_dict` gives an equal one back."""
        values = {field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        # left out where older versions need not know it, so that they read the rest
        return {name: value for name, value in values.items() if name != "head_dim" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """The configuration that `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        values = dict(values)
        if "levels" in values:
            values["levels"] = levels_from_json(values["levels"])
        if values.get("focus") is not None:
            values["focus"] = from_mapping(Focus, values["focus"])
        if values.get("patches") is not None:
            values["patches"] = from_mapping(Patches, values["patches"])
        for name in ("rope_theta", "num_heads", "num_kv_heads", "num_dense_heads", "ffn_dim"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return from_mapping(cls, values)


def check_blocks(
    *,
    dim: int,
    num_heads: LayerCounts,
    num_kv_heads: LayerCounts | None,
    num_layers: int,
    ffn_dim: LayerCounts | None,
    rope_theta: LayerThetas,
    dropout: float,
    focus: Focus | None,
    is_causal: bool,
    activation: str = "gelu",
    norm_first: bool = True,
    has_first_norm: bool = True,
    head_dim: int | None = None,
) -> None:
    """Raise `ConfigError` if blocks of these sizes cannot be built."""
    _check_at_least_one(dim=dim, num_layers=num_layers, head_dim=head_dim)
    sizes = block_sizes(dim, num_heads, num_kv_heads, ffn_dim, num_layers)
    for heads, kv_heads, width in sizes:
        _check_at_least_one(num_heads=heads, num_kv_heads=kv_heads, ffn_dim=width)
        if head_dim is None and dim % heads:
            raise ConfigError(
                f"dim={dim} is no multiple of num_heads={heads}; heads share the width evenly unless head_dim is given."
            )
        if heads % kv_heads:
            raise ConfigError(f"num_heads={heads} is no multiple of num_kv_heads={kv_heads}.")
    if head_dim is None and len({heads for heads, _, _ in sizes}) > 1:
        raise ConfigError(
            f"num_heads={num_heads} differs from block to block, so that dim={dim} does not say how wide a head is; "
            "give head_dim."
        )
    for theta in layer_thetas(rope_theta, num_layers):
        if theta is not None and theta <= 0:
            raise ConfigError(f"rope_theta={theta} must be > 0; None leaves positions out.")
    check_activation(activation)
    if not (norm_first or has_first_norm):
        raise ConfigError(
            "has_first_norm=False leaves out a norm before attention, and norm_first=False has none; set one to True."
        )
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout={dropout} must lie in [0, 1).")
    if focus is not None and is_causal:
        raise ConfigError(
            "Focus: the scorer reads the whole text, so a causal model would see its future; set is_causal=False."
        )
    if focus is not None and focus.after_layer >= num_layers:
        raise ConfigError(
            f"Focus: after_layer={focus.after_layer} leaves no block of num_layers={num_layers} to focus; "
            f"choose 1 to {num_layers - 1}."
        )


def layer_levels(levels: LayerLevels, num_layers: int) -> tuple[Levels | None, ...]:
    """One entry for each block."""
    return _for_each(levels, num_layers, "levels", "Levels")


def layer_thetas(rope_theta: LayerThetas, num_layers: int) -> tuple[float | None, ...]:
    """The base of the rotary positions of each block."""
    return _for_each(rope_theta, num_layers, "rope_theta", "number")


def layer_counts(counts: LayerCounts, num_layers: int, name: str) -> tuple[int, ...]:
    """The count that the field `name` gives each block."""
    return _for_each(counts, num_layers, name, "number")


def block_sizes(
    dim: int,
    num_heads: LayerCounts,
    num_kv_heads: LayerCounts | None,
    ffn_dim: LayerCounts | None,
    num_layers: int,
) -> tuple[tuple[int, int, int], ...]:
    """Heads, key and value heads, and feed-forward width of each block, defaults filled in."""
    heads = layer_counts(num_heads, num_layers, "num_heads")
    kv_heads = heads if num_kv_heads is None else layer_counts(num_kv_heads, num_layers, "num_kv_heads")
    widths = layer_counts(4 * dim if ffn_dim is None else ffn_dim, num_layers, "ffn_dim")
    return tuple(zip(heads, kv_heads, widths, strict=True))


def uniform_heads(config: EncoderConfig) -> int:
    """The heads of a block, where every block has as many.

    Raises:
        ConfigError: blocks differ, as in a pruned encoder.
    """
    counts = set(layer_counts(config.num_heads, config.num_layers, "num_heads"))
    if len(counts) > 1:
        raise ConfigError(
            f"num_heads={config.num_heads} differs from block to block and as many in each are needed here; take the "
            "encoder as it was before pruning, and prune last."
        )
    return counts.pop()


def head_width(config: EncoderConfig) -> int:
    """Width of a head, the same in every block."""
    return config.dim // uniform_heads(config) if config.head_dim is None else config.head_dim


def _check_at_least_one(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size} must be >= 1.")


def _for_each(value: Entry | tuple[Entry, ...], num_layers: int, name: str, kind: str) -> tuple[Entry, ...]:
    if not isinstance(value, tuple):
        return (value,) * num_layers
    if len(value) != num_layers:
        raise ConfigError(
            f"{name} has {len(value)} entries and the model {num_layers} blocks; give one for each, or a single "
            f"{kind} for all."
        )
    return value


def levels_from_json(value: Any) -> LayerLevels:
    """Levels from what `to_dict` made of them: None, an object, or a list with one for each block."""
    if isinstance(value, (list, tuple)):
        return tuple(_one_from_json(item) for item in value)
    return _one_from_json(value)


def _one_from_json(value: Any) -> Levels | None:
    if value is None or isinstance(value, Levels):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"levels={value!r} is neither null nor an object with the fields of Levels.")
    values = dict(value)
    if "ratio" in values and not isinstance(values["ratio"], LevelRatio):
        values["ratio"] = _ratio_from_json(values["ratio"])
    return from_mapping(Levels, values)


def _ratio_from_json(value: Any) -> LevelRatio:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ConfigError(f"ratio={value!r} must be three shares, local, regional, global, e.g. [6, 3, 1].")
    return LevelRatio(*value)


T = TypeVar("T")


def from_mapping(cls: type[T], values: Any) -> T:
    """Build the configuration class `cls` from its fields.

    Raises:
        ConfigError: `values` is no mapping, has a key that is no field, lacks a required one, or a value is of the
            wrong kind.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(f"{cls.__name__}: {values!r} is no table of values.")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown key {', '.join(map(repr, unknown))}; known are {', '.join(known)}.")
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise ConfigError(f"{cls.__name__}: {', '.join(map(repr, missing))} is missing.")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{cls.__name__}: a value has the wrong type ({error}).") from error


def _to_json(value: Any) -> Any:
    if isinstance(value, LevelRatio):
        return list(value.shares)
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value
