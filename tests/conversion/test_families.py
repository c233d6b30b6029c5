from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conversion.pretrained import (
    DIM,
    IMAGES,
    SIZES,
    TEXT,
    difference,
    inputs,
    make,
    reference,
    save,
    transformers,
)
from trilevel.conversion.families import FAMILIES, find_family
from trilevel.conversion.settings import Settings
from trilevel.conversion.source import load_source
from trilevel.errors import CheckpointError, ConfigError
from trilevel.model.encoder import Encoder

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed (extra convert)")

BOUND = 1e-5


def converted(model: Any, folder: Path, **options: Any) -> Encoder:
    return load_source(save(model, folder, **options)).encoder


def output(encoder: Encoder, given: Tensor, **masks: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = encoder(given, **masks)
    assert isinstance(hidden, Tensor)
    return hidden


def change(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    """Rewrite config.json."""
    path = folder / "config.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (old | values).items() if key not in drop}))


# definition: what transformers computes


@pytest.mark.parametrize("family", list(SIZES))
def test_output_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    model = make(family)
    encoder = converted(model, tmp_path)
    assert not encoder.training
    for batch in (1, 3):
        given = inputs(family, batch)
        assert difference(output(encoder, given), reference(model, given)) < BOUND


@pytest.mark.parametrize("side", ["right", "left", "middle"])
@pytest.mark.parametrize("family", TEXT)
def test_padding_is_where_the_mask_says(family: str, side: str, tmp_path: Path) -> None:
    model = make(family)
    encoder = converted(model, tmp_path)
    ids = inputs(family)
    padding = torch.zeros_like(ids, dtype=torch.bool)
    start = {"right": 17, "left": 0, "middle": 5}[side]
    padding[1, start : start + 12] = True
    ids[padding] = model.config.pad_token_id
    theirs = reference(model, ids, attention_mask=(~padding).long())
    assert difference(output(encoder, ids, padding_mask=padding), theirs, ~padding) < BOUND


def test_rotary_positions_go_on_beyond_the_trained_length(tmp_path: Path) -> None:
    model = make("modernbert")
    source = load_source(save(model, tmp_path))
    assert source.trained_tokens == 53
    ids = inputs("modernbert", 2, 151)
    assert difference(output(source.encoder, ids), reference(model, ids)) < BOUND


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_learned_positions_repeat_beyond_the_trained_length(family: str, tmp_path: Path) -> None:
    model = make(family)
    source = load_source(save(model, tmp_path))
    first = model.config.pad_token_id + 1 if family == "roberta" else 0
    assert source.trained_tokens == 53 - first
    # Longformer's trick on the model itself: a longer table, filled with the rows that real tokens read
    longer = make(family, max_position_embeddings=first + 3 * source.trained_tokens)
    rows = model.base_model.embeddings.position_embeddings.weight.detach()
    state = model.state_dict()
    state["embeddings.position_embeddings.weight"] = torch.cat([rows[:first], *3 * [rows[first:]]])
    longer.load_state_dict(state)
    ids = inputs(family, 2, 139)
    assert difference(output(source.encoder, ids), reference(longer, ids)) < BOUND
    assert source.encoder.config.max_tokens == 65_536
    assert source.encoder.embedding.positions.num_embeddings == source.trained_tokens


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_token_types(family: str, tmp_path: Path) -> None:
    model = make(family, type_vocab_size=3)
    encoder = converted(model, tmp_path)
    ids = inputs(family)
    types = torch.randint(0, 3, ids.shape)
    theirs = reference(model, ids, token_type_ids=types)
    assert difference(output(encoder, ids, token_type_ids=types), theirs) < BOUND


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"hidden_act": "gelu_new"}),
    ("bert", {"hidden_act": "relu"}),
    ("bert", {"hidden_act": "swish", "type_vocab_size": 1}),
    ("roberta", {"pad_token_id": 4}),
    ("distilbert", {"activation": "relu"}),
    ("modernbert", {"hidden_activation": "silu"}),
    ("modernbert", {"attention_bias": True}),
    ("modernbert", {"mlp_bias": True}),
    ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    ("modernbert", {"local_attention": 7}),
    ("modernbert", {"layer_types": ["sliding_attention", *3 * ["full_attention"], "sliding_attention"]}),
    (
        "modernbert",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 13.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
            }
        },
    ),
    ("vit", {"qkv_bias": False, "image_size": 15, "patch_size": 5}),
    ("vit", {"hidden_act": "relu", "num_channels": 5}),
    ("deit", {"qkv_bias": False}),
]


@pytest.mark.parametrize(("family", "changes"), CHANGES)
def test_settings_are_heeded(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make(family, **changes)
    # some of the changes make large values, whose rounding in float32 differs from processor to processor
    encoder = converted(model, tmp_path).double()
    model = model.double()
    given = inputs(family)
    if family in ("vit", "deit"):
        size = model.config.image_size
        given = torch.randn(2, model.config.num_channels, *(size if isinstance(size, list) else (size, size)))
        given = given.double()
    theirs = reference(model, given)
    assert difference(output(encoder, given), theirs) < BOUND
    # a setting that changed nothing would prove nothing
    sizes = {"image_size", "num_channels", "pad_token_id", "type_vocab_size"}
    if not sizes & set(changes):
        usual = make(family).double()
        usual.load_state_dict(model.state_dict(), strict=False)
        assert (reference(usual, given) - theirs).abs().max() > 10 * BOUND


def test_modernbert_settings_in_the_form_of_transformers_4(tmp_path: Path) -> None:
    thetas = {
        "full_attention": {"rope_type": "default", "rope_theta": 13.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
    }
    kinds = ["full_attention" if index % 2 == 0 else "sliding_attention" for index in range(5)]
    model = make("modernbert", rope_parameters=thetas, layer_types=kinds)
    folder = save(model, tmp_path)
    old = {"global_rope_theta": 13.0, "local_rope_theta": 3.0, "global_attn_every_n_layers": 2}
    change(folder, drop=("rope_parameters", "layer_types"), **old)
    ids = inputs("modernbert")
    assert difference(output(load_source(folder).encoder, ids), reference(model, ids)) < BOUND


def test_defaults_are_those_of_transformers() -> None:
    sizes = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    sizes |= {"dim", "n_layers", "n_heads", "hidden_dim", "model_type"}
    for family, values in SIZES.items():
        fixed = {name: value for name, value in values.items() if name in sizes}
        whole = transformers.AutoConfig.for_model(family, **fixed).to_dict()
        bare = Settings({name: value for name, value in whole.items() if name in sizes})
        assert FAMILIES[family].plan(bare) == FAMILIES[family].plan(Settings(whole)), family
    # a constant in the code of transformers
    assert FAMILIES["distilbert"].plan(Settings(SIZES["distilbert"])).config.norm_eps == 1e-12


def test_packed_texts_are_separate_inputs(tmp_path: Path) -> None:
    for family in ("bert", "roberta"):
        encoder = converted(make(family), tmp_path / family)
        ids = inputs(family, 1)
        segments = (torch.arange(29) >= 11).long()[None]
        padding = torch.zeros(1, 29, dtype=torch.bool)
        padding[:, 9:13] = True
        packed = output(encoder, ids, segment_ids=segments, padding_mask=padding)
        apart = [output(encoder, ids[:, part], padding_mask=padding[:, part]) for part in (slice(0, 11), slice(11, 29))]
        assert difference(packed, torch.cat(apart, dim=1), ~padding) < BOUND


# what else a folder may hold


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "ForMaskedLM"),
        ("bert", "ForSequenceClassification"),
        ("roberta", "ForMaskedLM"),
        ("xlm-roberta", "ForSequenceClassification"),
        ("distilbert", "ForMaskedLM"),
        ("distilbert", "ForSequenceClassification"),
        ("modernbert", "ForMaskedLM"),
        ("modernbert", "ForTokenClassification"),
        ("vit", "ForImageClassification"),
        ("vit", "ForMaskedImageModeling"),
        ("deit", "ForImageClassification"),
    ],
)
def test_heads_are_left_out_and_named(family: str, head: str, tmp_path: Path) -> None:
    changes = {"image_size": 15, "patch_size": 3, "encoder_stride": 3} if head == "ForMaskedImageModeling" else {}
    model = make(family, head, **changes)
    source = load_source(save(model, tmp_path))
    given = torch.randn(1, IMAGES["num_channels"], 15, 15) if changes else inputs(family)
    assert difference(output(source.encoder, given), reference(model, given)) < BOUND
    prefix = FAMILIES[family].prefix
    assert source.leftovers
    assert not any(name.startswith((f"{prefix}encoder", f"{prefix}layers")) for name in source.leftovers)


def test_pooler_is_left_out(tmp_path: Path) -> None:
    leftovers = load_source(save(make("bert"), tmp_path)).leftovers
    assert leftovers == ("pooler.dense.bias", "pooler.dense.weight")


def test_shards(tmp_path: Path) -> None:
    model = make("bert")
    folder = save(model, tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    ids = inputs("bert")
    assert difference(output(load_source(folder).encoder, ids), reference(model, ids)) < BOUND


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    model = make("bert").to(torch.bfloat16)
    encoder = converted(model, tmp_path)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    ids = inputs("bert")
    assert difference(output(encoder, ids), reference(model.float(), ids)) < BOUND


def test_norms_of_the_first_berts(tmp_path: Path) -> None:
    model = make("bert")
    folder = save(model, tmp_path)
    path = folder / "model.safetensors"
    renamed = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in safetensors.load_file(path).items()
    }
    safetensors.save_file(renamed | {"bert.embeddings.position_ids": torch.arange(53)[None]}, path)
    ids = inputs("bert")
    assert difference(output(load_source(folder).encoder, ids), reference(model, ids)) < BOUND


def test_parameters_can_be_trained(tmp_path: Path) -> None:
    encoder = converted(make("bert"), tmp_path).train()
    output_ = encoder(inputs("bert"), token_type_ids=torch.ones(3, 29, dtype=torch.long))
    assert isinstance(output_, Tensor)
    output_.square().mean().backward()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in encoder.parameters())
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())
    assert encoder.config.dropout == 0.1


# messages


@pytest.mark.parametrize(
    ("family", "values", "match"),
    [
        ("bert", {"model_type": "bart"}, "model_type='bart'; supported are bert, roberta, .*deit. Choose"),
        ("bert", {"model_type": None}, "model_type=None; supported are"),
        (
            "bert",
            {"model_type": "x", "auto_map": {"AutoModel": "x.X"}},
            r"code of its own \(auto_map\), which is never",
        ),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key', which is not"),
        ("bert", {"is_decoder": True}, "is_decoder=True, which is not supported; supported is False"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("bert", {"is_encoder_decoder": True}, "is_encoder_decoder=True"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads=.*which is not supported; supported is None"),
        ("vit", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("bert", {"hidden_act": "mish"}, "hidden_act='mish'; one of gelu, .*silu, swish is supported"),
        ("bert", {"hidden_size": "42"}, "hidden_size='42'; an integer is supported"),
        ("bert", {"hidden_size": 43}, "dim=43 is no multiple of num_heads=3"),
        ("bert", {"layer_norm_eps": "tiny"}, "layer_norm_eps='tiny'; a number >= 0 is supported"),
        ("modernbert", {"norm_bias": 1}, "norm_bias=1; true or false is supported"),
        ("modernbert", {"layer_types": ["full_attention"]}, "a list of 5 of full_attention, sliding_attention"),
        ("modernbert", {"layer_types": 5 * ["half"]}, "layer_types=.*is supported"),
        ("modernbert", {"layer_types": None, "global_attn_every_n_layers": 0}, "every_n_layers=0; .* with n > 0"),
        ("modernbert", {"rope_parameters": [1]}, r"rope_parameters=\[1\]; an object is supported"),
        (
            "modernbert",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_type='yarn', which is not",
        ),
        ("modernbert", {"rope_scaling": {"factor": 2.0}}, "rope_scaling=.*which is not supported"),
        ("roberta", {"pad_token_id": None}, "pad_token_id=None; an integer is supported"),
        ("roberta", {"pad_token_id": 52}, "more than 53 positions are needed"),
        ("vit", {"image_size": [8, 9, 10]}, r"image_size=\[8, 9, 10\]; an integer or two is supported"),
        ("vit", {"patch_size": 4}, r"patch_size=\(4, 4\) does not divide image_size=\(10, 21\)"),
    ],
)
def test_unsupported_settings_are_named(family: str, values: dict[str, Any], match: str, tmp_path: Path) -> None:
    folder = save(make(family), tmp_path)
    change(folder, **values)
    with pytest.raises(ConfigError, match=match):
        load_source(folder)


def test_missing_setting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config\.json lacks 'hidden_size', which is needed"):
        find_family({"model_type": "bert"}).plan(Settings({}))


def test_absent_and_null_settings_mean_the_usual(tmp_path: Path) -> None:
    folder = save(make("bert"), tmp_path)
    change(folder, position_embedding_type=None, pruned_heads={}, is_decoder=None, pad_token_id=None)
    source = load_source(folder)
    # the tokenizer knows it
    assert source.padding_id == 0


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"encoder.layer.1.output.dense.bias": None}, "lack encoder.layer.1.output.dense.bias, which a bert of this"),
        ({"encoder.layer.3.output.dense.bias": torch.ones(DIM)}, "hold encoder.layer.3.output.dense.bias, which is no"),
        ({"adapter.weight": torch.ones(2)}, "hold adapter.weight, which is no part of a bert"),
        (
            {"encoder.layer.1.attention.self.key.weight": torch.ones(DIM, DIM + 1)},
            r"encoder.layer.1.attention.self.key.weight has shape \(42, 43\); config.json says \(42, 42\)",
        ),
        (
            {"embeddings.position_embeddings.weight": torch.ones(50, DIM)},
            r"shape \(50, 42\); config.json says \(53, 42\)",
        ),
        ({"encoder.layer.0.output.dense.bias": torch.ones(DIM, dtype=torch.int8)}, "type torch.int8; only floating"),
    ],
)
def test_weights_that_do_not_fit_are_named(edit: dict[str, Tensor | None], match: str, tmp_path: Path) -> None:
    folder = save(make("bert"), tmp_path)
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path) | edit
    safetensors.save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=match):
        load_source(folder)


def test_missing_bias_is_an_error_where_the_settings_promise_one(tmp_path: Path) -> None:
    folder = save(make("vit", qkv_bias=False), tmp_path)
    change(folder, qkv_bias=True)
    with pytest.raises(CheckpointError, match=r"lack encoder.layer.0.attention.attention.key.bias, .* and \d+ more"):
        load_source(folder)


def test_a_bias_that_the_settings_deny_is_an_error(tmp_path: Path) -> None:
    folder = save(make("vit"), tmp_path)
    change(folder, qkv_bias=False)
    with pytest.raises(
        CheckpointError, match=r"hold encoder.layer.0.attention.attention.key.bias, .* and 6 more, which"
    ):
        load_source(folder)
