"""Families of pretrained encoders: their configuration and their weights' names in terms of ours.

The sources are the models of Hugging Face transformers (`models/{bert,roberta,distilbert,modernbert,vit,deit}`), whose
outputs tests/conversion compares. Names are those that `save_pretrained` writes, without the model's own prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trilevel.attention.levels import LevelRatio, Levels
from trilevel.conversion.settings import Settings
from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig
from trilevel.model.patches import Patches

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Activations by their name in a config.json."""

HEADS = ("pooler.", "classifier.", "qa_outputs.", "embeddings.position_ids")
"""What every family may have beside the encoder, by the start of the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one model of a family becomes an `Encoder`.

    Attributes:
        config: the dense encoder's. ModernBERT's sliding layers are strict local levels, which are what they compute.
        modules: our module to the source's parameters, `*` standing for weight and bias; several are stacked along the
            first axis.
        trained_tokens: longest input the positions were trained for; for images the tokens of one.
        padding_id: the configuration's padding token.
        without_bias: our modules that have a bias, zero here, where the source has none.
        first_rows: rows at the start of a source's parameter, by our module, that no real token reads.
    """

    config: EncoderConfig
    modules: Mapping[str, tuple[str, ...]]
    trained_tokens: int
    padding_id: int | None = None
    without_bias: frozenset[str] = frozenset()
    first_rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of encoders.

    Attributes:
        name: the `model_type` of its config.json.
        prefix: what names start with in a model that has a head.
        plan: from settings to a `Plan`.
        leftovers: starts of names of weights that are no part of the encoder, beside `HEADS`.
        inputs: what the model reads.
        vocabulary: how a tokenizer is built where there is no tokenizer.json: WordPiece from vocab.txt, byte-level BPE
            from vocab.json and merges.txt, or not at all.
    """

    name: str
    prefix: str
    plan: Callable[[Settings], Plan]
    leftovers: tuple[str, ...] = ()
    inputs: Literal["text", "images"] = "text"
    vocabulary: Literal["wordpiece", "bpe"] | None = None


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: it is none of `FAMILIES`.
    """
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    remote = " It asks for code of its own (auto_map), which is never run." if "auto_map" in values else ""
    raise ConfigError(
        f"config.json has model_type={kind!r}; supported are {', '.join(FAMILIES)}.{remote} "
        "Choose an encoder of one of these families."
    )


def _post_norm(settings: Settings, **changes: Any) -> EncoderConfig:
    values = {
        "vocab_size": settings.number("vocab_size"),
        "levels": None,
        "rope_theta": None,
        # the padding row is as trained, not zero
        "padding_id": None,
        "norm_eps": settings.real("layer_norm_eps", 1e-12),
        "norm_first": False,
        "has_final_norm": False,
        "has_embedding_norm": True,
    }
    return EncoderConfig(**(values | changes))


def _hidden_sizes(settings: Settings, *, dropout: float) -> dict[str, Any]:
    return {
        "dim": settings.number("hidden_size"),
        "num_heads": settings.number("num_attention_heads"),
        "num_layers": settings.number("num_hidden_layers"),
        "ffn_dim": settings.number("intermediate_size"),
        "dropout": settings.real("hidden_dropout_prob", dropout),
        "activation": settings.choice("hidden_act", "gelu", ACTIVATIONS),
    }


def _bert(settings: Settings) -> Plan:
    _check_encoder(settings)
    config = _post_norm(
        settings,
        **_hidden_sizes(settings, dropout=0.1),
        num_positions=settings.number("max_position_embeddings", 512),
        num_token_types=settings.number("type_vocab_size", 2),
    )
    block = {
        "attention.in_proj": (
            "attention.self.query.*",
            "attention.self.key.*",
            "attention.self.value.*",
        ),
        "attention.out_proj": ("attention.output.dense.*",),
        "attention_norm": ("attention.output.LayerNorm.*",),
        "ffn.up": ("intermediate.dense.*",),
        "ffn.down": ("output.dense.*",),
        "ffn_norm": ("output.LayerNorm.*",),
    }
    modules = {
        **_TOKEN_EMBEDDING,
        "embedding.token_types": ("embeddings.token_type_embeddings.*",),
        **_blocks(config.num_layers, "encoder.layer", block),
    }
    return Plan(
        config=config,
        modules=modules,
        trained_tokens=settings.number("max_position_embeddings", 512),
        padding_id=_padding_id(settings, 0),
    )


def _roberta(settings: Settings) -> Plan:
    bert = _bert(settings)
    padding_id = settings.number("pad_token_id", 1)
    # positions count from padding_id + 1 over real tokens: the rows before that are read by padding alone
    unread = padding_id + 1
    rows = bert.trained_tokens - unread
    if rows < 1 or padding_id < 0:
        raise ConfigError(
            f"config.json has max_position_embeddings={bert.trained_tokens} and pad_token_id={padding_id}; a token "
            f">= 0 and more than {unread} positions are needed, for they count from there. Download the model again."
        )
    return Plan(
        config=replace(bert.config, num_positions=rows, positions_skip_padding=True),
        modules=bert.modules,
        trained_tokens=rows,
        padding_id=padding_id,
        first_rows={"embedding.positions": unread},
    )


def _distilbert(settings: Settings) -> Plan:
    _check_encoder(settings)
    num_positions = settings.number("max_position_embeddings", 512)
    config = _post_norm(
        settings,
        dim=settings.number("dim"),
        num_heads=settings.number("n_heads"),
        num_layers=settings.number("n_layers"),
        ffn_dim=settings.number("hidden_dim"),
        dropout=settings.real("dropout", 0.1),
        activation=settings.choice("activation", "gelu", ACTIVATIONS),
        # a constant of its code
        norm_eps=1e-12,
        num_positions=num_positions,
    )
    block = {
        "attention.in_proj": ("attention.q_lin.*", "attention.k_lin.*", "attention.v_lin.*"),
        "attention.out_proj": ("attention.out_lin.*",),
        "attention_norm": ("sa_layer_norm.*",),
        "ffn.up": ("ffn.lin1.*",),
        "ffn.down": ("ffn.lin2.*",),
        "ffn_norm": ("output_layer_norm.*",),
    }
    return Plan(
        config=config,
        modules={**_TOKEN_EMBEDDING, **_blocks(config.num_layers, "transformer.layer", block)},
        trained_tokens=num_positions,
        padding_id=_padding_id(settings, 0),
    )


def _modernbert(settings: Settings) -> Plan:
    _check_encoder(settings)
    num_layers = settings.number("num_hidden_layers")
    is_sliding = _sliding_layers(settings, num_layers)
    thetas = {sliding: _theta(settings, sliding) for sliding in (False, True)}
    local = Levels(
        ratio=LevelRatio(1, 0, 0), mode="strict", window=2 * (settings.number("local_attention", 128) // 2) + 1
    )
    biased = {
        "attention.in_proj": settings.flag("attention_bias", default=False),
        "attention.out_proj": settings.flag("attention_bias", default=False),
        "ffn.up": settings.flag("mlp_bias", default=False),
        "ffn.down": settings.flag("mlp_bias", default=False),
    }
    config = EncoderConfig(
        vocab_size=settings.number("vocab_size"),
        dim=settings.number("hidden_size"),
        num_heads=settings.number("num_attention_heads"),
        num_layers=num_layers,
        ffn_dim=settings.number("intermediate_size"),
        levels=tuple(local if sliding else None for sliding in is_sliding),
        rope_theta=tuple(thetas[sliding] for sliding in is_sliding),
        dropout=settings.real("mlp_dropout", 0.0),
        norm_eps=settings.real("norm_eps", 1e-5),
        padding_id=None,
        has_first_norm=False,
        has_embedding_norm=True,
        bias=any(biased.values()),
        norm_bias=settings.flag("norm_bias", default=False),
        activation=settings.choice("hidden_activation", "gelu", ACTIVATIONS),
        is_gated=True,
    )
    block = {
        "attention_norm": ("attn_norm.*",),
        "attention.in_proj": ("attn.Wqkv.*",),
        "attention.out_proj": ("attn.Wo.*",),
        "ffn_norm": ("mlp_norm.*",),
        "ffn.up": ("mlp.Wi.*",),
        "ffn.down": ("mlp.Wo.*",),
    }
    modules = {
        "embedding.table": ("embeddings.tok_embeddings.*",),
        "embedding.norm": ("embeddings.norm.*",),
        "stack.final_norm": ("final_norm.*",),
        **_blocks(num_layers, "layers", block),
    }
    return Plan(
        config=config,
        modules=modules,
        trained_tokens=settings.number("max_position_embeddings", 8192),
        padding_id=_padding_id(settings, 50_283),
        without_bias=_in_blocks(num_layers, *(module for module, has in biased.items() if not has)),
    )


def _sliding_layers(settings: Settings, num_layers: int) -> tuple[bool, ...]:
    """Which layers see a window: by their list of types, or all but every n-th."""
    every = settings.number("global_attn_every_n_layers", 3)
    given = settings.values.get("layer_types")
    if given is None and every > 0:
        return tuple(index % every > 0 for index in range(num_layers))
    kinds = {"full_attention": False, "sliding_attention": True}
    if not isinstance(given, list) or len(given) != num_layers or any(kind not in tuple(kinds) for kind in given):
        raise ConfigError(
            f"config.json has layer_types={given!r} and global_attn_every_n_layers={every}; a list of {num_layers} of "
            f"{', '.join(kinds)} is supported, or every n-th layer with n > 0."
        )
    return tuple(kinds[kind] for kind in given)


def _theta(settings: Settings, is_sliding: bool) -> float:
    """Base of the rotary positions of the sliding or the full layers, in the form of transformers 5 or 4."""
    layer, name, default = (
        ("sliding_attention", "local_rope_theta", 10_000.0)
        if is_sliding
        else ("full_attention", "global_rope_theta", 160_000.0)
    )
    settings.refuse("rope_scaling", unless=None)
    given = Settings(Settings(settings.table("rope_parameters")).table(layer))
    given.refuse("rope_type", unless="default")
    return given.real("rope_theta", settings.real(name, default))


def _vit(settings: Settings) -> Plan:
    return _images(settings, ("embeddings.cls_token",))


def _deit(settings: Settings) -> Plan:
    return _images(settings, ("embeddings.cls_token", "embeddings.distillation_token"))


def _images(settings: Settings, extra_tokens: tuple[str, ...]) -> Plan:
    _check_encoder(settings)
    patches = Patches(
        image_size=settings.pair("image_size", 224),
        patch_size=settings.pair("patch_size", 16),
        num_channels=settings.number("num_channels", 3),
        num_extra_tokens=len(extra_tokens),
    )
    config = EncoderConfig(
        vocab_size=None,
        **_hidden_sizes(settings, dropout=0.0),
        levels=None,
        rope_theta=None,
        norm_eps=settings.real("layer_norm_eps", 1e-12),
        padding_id=None,
        patches=patches,
    )
    block = {
        "attention_norm": ("layernorm_before.*",),
        "attention.in_proj": (
            "attention.attention.query.*",
            "attention.attention.key.*",
            "attention.attention.value.*",
        ),
        "attention.out_proj": ("attention.output.dense.*",),
        "ffn_norm": ("layernorm_after.*",),
        "ffn.up": ("intermediate.dense.*",),
        "ffn.down": ("output.dense.*",),
    }
    modules = {
        "embedding.projection": ("embeddings.patch_embeddings.projection.*",),
        "embedding.extra_tokens": extra_tokens,
        "embedding.positions": ("embeddings.position_embeddings",),
        "stack.final_norm": ("layernorm.*",),
        **_blocks(config.num_layers, "encoder.layer", block),
    }
    has_bias = settings.flag("qkv_bias", default=True)
    return Plan(
        config=config,
        modules=modules,
        trained_tokens=patches.num_tokens,
        without_bias=frozenset() if has_bias else _in_blocks(config.num_layers, "attention.in_proj"),
    )


_TOKEN_EMBEDDING = {
    "embedding.table": ("embeddings.word_embeddings.*",),
    "embedding.positions": ("embeddings.position_embeddings.*",),
    "embedding.norm": ("embeddings.LayerNorm.*",),
}


def _blocks(num_layers: int, prefix: str, block: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {
        f"stack.blocks.{index}.{module}": tuple(f"{prefix}.{index}.{source}" for source in sources)
        for index in range(num_layers)
        for module, sources in block.items()
    }


def _in_blocks(num_layers: int, *modules: str) -> frozenset[str]:
    return frozenset(f"stack.blocks.{index}.{module}" for index in range(num_layers) for module in modules)


def _padding_id(settings: Settings, default: int) -> int | None:
    return None if settings.values.get("pad_token_id", default) is None else settings.number("pad_token_id", default)


def _check_encoder(settings: Settings) -> None:
    settings.refuse("position_embedding_type", unless="absolute")
    for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        settings.refuse(name, unless=False)
    for name in ("pruned_heads", "quantization_config"):
        settings.refuse(name, unless=None)


_MASKED_LM = ("cls.", "lm_head.")

FAMILIES = {
    family.name: family
    for family in (
        Family(name="bert", prefix="bert.", plan=_bert, leftovers=_MASKED_LM, vocabulary="wordpiece"),
        Family(name="roberta", prefix="roberta.", plan=_roberta, leftovers=_MASKED_LM, vocabulary="bpe"),
        Family(name="xlm-roberta", prefix="roberta.", plan=_roberta, leftovers=_MASKED_LM),
        Family(
            name="distilbert",
            prefix="distilbert.",
            plan=_distilbert,
            leftovers=("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pre_classifier."),
            vocabulary="wordpiece",
        ),
        Family(name="modernbert", prefix="model.", plan=_modernbert, leftovers=("head.", "decoder.")),
        Family(name="vit", prefix="vit.", plan=_vit, leftovers=("embeddings.mask_token", "decoder."), inputs="images"),
        Family(
            name="deit",
            prefix="deit.",
            plan=_deit,
            leftovers=("embeddings.mask_token", "decoder.", "cls_classifier.", "distillation_classifier."),
            inputs="images",
        ),
    )
}
"""The families by the `model_type` of their config.json."""
