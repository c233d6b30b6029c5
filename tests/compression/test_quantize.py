"""Quantized models: what is rounded and what is not, training through it, and the stored integers."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.compression.layers import (
    FrozenEmbedding,
    FrozenEmbedding4bit,
    FrozenLinear,
    FrozenLinear4bit,
    FrozenLinear8bitOf4,
    InputGrid,
    QuantizedEmbedding,
    QuantizedLinear,
)
from trilevel.compression.quantize import (
    QuantizeConfig,
    freeze,
    load_frozen,
    prepare,
    quantize,
    quantized_bytes,
    targets,
)
from trilevel.errors import CheckpointError, ConfigError, InputError
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=8, num_global_tokens=3)
STRICT = Levels(ratio=LevelRatio(1, 1, 1), mode="strict", window=5, region_size=8, num_global_tokens=3)
CONFIGS: dict[str, QuantizeConfig] = {
    "int8": QuantizeConfig(smooth=None),
    "uint8": QuantizeConfig(activations="uint8", observer="mse", smooth=None),
    "smooth": QuantizeConfig(activations="uint8"),
    "percentile": QuantizeConfig(observer="percentile", percentile=99.9),
    "learned": QuantizeConfig(learned_ranges=True, smooth=0.5),
    "table_4bit": QuantizeConfig(embedding_bits=4, smooth=None),
    "int8_of_4bit": QuantizeConfig(weight_bits=4),
    "int8_of_4bit_learned": QuantizeConfig(weight_bits=4, smooth=None, learned_ranges=True),
    "weights": QuantizeConfig(activations=None),
    "weights_4bit": QuantizeConfig(activations=None, weight_bits=4),
    "weights_4bit_learned": QuantizeConfig(activations=None, weight_bits=4, group_size=64, learned_ranges=True),
}


def encoder(**options: Any) -> Encoder:
    """Norms and biases that differ from their start; 3 KV groups of 6 heads."""
    given: dict[str, Any] = {"vocab_size": 101, "dim": 24, "num_heads": 6, "num_kv_heads": 3, "num_layers": 2}
    model = Encoder(EncoderConfig(**{**given, "levels": LEVELS, "ffn_dim": 40, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
            if name == "embedding.table.weight":
                parameter[0] = 0
    return model


def batches() -> list[Tensor]:
    return [torch.randint(1, 101, (2, tokens)) for tokens in (13, 41)]


def run(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch, padding_mask=batch == 0)
    return out


def attention(model: nn.Module) -> MultiLevelAttention:
    layer = model.get_submodule("stack.blocks.0.attention")
    assert isinstance(layer, MultiLevelAttention)
    return layer


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_function_stays_nearly_and_frozen_exactly(name: str) -> None:
    model, data = encoder(), batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantized = quantize(model, CONFIGS[name], data).eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    frozen = freeze(quantized)
    with torch.no_grad():
        for batch in data:
            wanted = model(batch)
            found = quantized(batch)
            assert 0 < relative(found, wanted) < (0.15 if "4bit" in name else 0.03)
            assert torch.equal(frozen(batch), found)
            assert torch.equal(frozen(batch[:, :7]), quantized(batch[:, :7]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stored_model_comes_back(name: str) -> None:
    model, data = encoder(), batches()
    frozen = freeze(quantize(model, CONFIGS[name], data))
    file = io.BytesIO()
    torch.save(frozen.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    loaded = load_frozen(encoder(), state)
    assert torch.equal(loaded(data[0]), frozen(data[0]))
    assert quantized_bytes(loaded) == quantized_bytes(frozen)


def test_bytes_are_those_of_the_stored_integers() -> None:
    model = nn.Sequential(nn.Embedding(1_009, 64), nn.Linear(64, 128), nn.Linear(128, 64, bias=False))
    data = [torch.randint(0, 1_009, (3, 5))]
    floats = 4 * (1_009 * 64 + 64 * 128 * 2 + 128)
    assert quantized_bytes(model) == floats
    made = quantize(model, QuantizeConfig(smooth=None), data)
    # integers, scales of rows, bias, scale and zero point of two inputs
    wanted = 1_009 * 64 + 2 * 64 * 128 + 4 * (1_009 + 128 + 64) + 4 * 128 + 2 * 5
    assert quantized_bytes(made) == quantized_bytes(freeze(made)) == wanted
    four = quantize(model, QuantizeConfig(activations=None, weight_bits=4, group_size=32))
    assert quantized_bytes(four) == 1_009 * 64 + 64 * 128 + 4 * (1_009 + 128 * 2 + 64 * 4) + 4 * 128


def test_weights_are_rounded_by_output_and_the_padding_row_stays_zero() -> None:
    model = encoder()
    frozen = freeze(quantize(model, QuantizeConfig(smooth=None), batches()))
    linear, table = frozen.get_submodule("stack.blocks.1.ffn.up"), frozen.get_submodule("embedding.table")
    assert isinstance(linear, FrozenLinear)
    assert isinstance(table, FrozenEmbedding)
    table_weight = model.get_parameter("embedding.table.weight")
    for stored, weight in (
        (linear.weight_int8, model.get_parameter("stack.blocks.1.ffn.up.weight")),
        (table.weight_int8, table_weight),
    ):
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        if weight is not table_weight:
            pairs = weight.abs().unflatten(1, (-1, 2)).sum(2)
            scale = torch.maximum(scale, pairs.amax(1, keepdim=True) / 127)
        assert torch.equal(stored.float(), (weight / scale).round())
        assert 100 <= stored.abs().max() <= 127
    assert not table.weight_int8[0].any()
    assert torch.equal(linear.weight, linear.weight_int8 * linear.weight_scale[:, None])
    assert not frozen.get_submodule("embedding")(torch.zeros(1, 1, dtype=torch.int64)).any()


def test_groups_of_four_bits_are_rounded_each_on_its_own() -> None:
    linear = nn.Linear(70, 5)
    made = QuantizedLinear.of(linear, bits=4, group_size=32)
    frozen = made.frozen()
    padded = nn.functional.pad(linear.weight, (0, 26)).view(5, 3, 32)
    step = padded.abs().amax(2, keepdim=True) / 7
    plain = ((padded / step).round().clamp(-8, 7) * step).flatten(1)[:, :70]
    ours = made.rounded_weight()
    assert torch.equal(frozen.weight, ours)
    # the search is at least as good as the largest weight
    assert relative(ours, linear.weight) <= relative(plain, linear.weight)
    assert isinstance(frozen, FrozenLinear4bit)
    assert frozen.packed.shape == (5, 3, 16)


def test_weights_of_8_bits_are_stored_in_4() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(70, 5)
    with torch.no_grad():
        # groups of very different sizes, one of zeros, an output of zeros
        linear.weight[:, 32:64] *= 0.01
        linear.weight[1, :32] = 0
        linear.weight[2] = 0
    reads = InputGrid(grid="int8", low=-3.0, high=3.0)
    made = QuantizedLinear.of(linear, bits=4, group_size=32, reads=reads)
    frozen = made.frozen()
    assert isinstance(frozen, FrozenLinear8bitOf4)
    q = frozen.weight_int8
    assert torch.equal(frozen.weight, made.rounded_weight())
    assert torch.equal(frozen.weight, q * frozen.weight_scale[:, None])
    assert q.shape == (5, 70)
    assert q.abs().max() <= 64
    # each group is whole numbers -8..7 times its factor
    factors = frozen.weight_factors.repeat_interleave(32, 1)[:, :70]
    assert ((factors >= 1) & (factors <= 8)).all()
    assert torch.equal(q // factors * factors, q)
    # the largest group of each output is as fine as 4 bits are
    assert (frozen.weight_factors.amax(1)[[0, 3, 4]] == 8).all()
    assert relative(frozen.weight, linear.weight) < 0.1
    assert frozen.weight[2].abs().max() == 0
    assert frozen.packed.numel() + frozen.weight_factors.numel() == 5 * 3 * 17


@pytest.mark.parametrize("dim", [32, 40])
def test_rows_of_four_bits_are_rounded_by_groups(dim: int) -> None:
    table = nn.Embedding(19, dim, padding_idx=0)
    frozen = freeze(quantize(nn.Sequential(table), QuantizeConfig(embedding_bits=4)))[0]  # type: ignore[index]
    assert isinstance(frozen, FrozenEmbedding4bit)
    groups = -(-dim // 32)
    assert frozen.packed.shape == (19, 16 * groups)
    assert frozen.row_scale.shape == (19, groups)
    for row in range(19):
        for group in range(groups):
            own = table.weight[row, 32 * group : 32 * group + 32]
            scale = frozen.row_scale[row, group]
            wanted = (own / scale).round().clamp(-8, 7) * scale
            torch.testing.assert_close(frozen.weight[row, 32 * group : 32 * group + 32], wanted)
    ids = torch.tensor([[3, 0], [18, 3]])
    assert torch.equal(frozen(ids), frozen.weight[ids])
    assert not frozen(torch.tensor([0])).any()


@pytest.mark.parametrize("levels", [LEVELS, STRICT, None], ids=["calibrated", "strict", "dense"])
def test_what_chooses_tokens_stays_float(levels: Levels | None) -> None:
    model = encoder(levels=levels)
    names = list(targets(model, QuantizeConfig()))
    inner = [f"{part}" for part in ("attention.in_proj", "attention.out_proj", "ffn.up", "ffn.down")]
    assert names == ["embedding.table", *(f"stack.blocks.{block}.{part}" for block in (0, 1) for part in inner)]
    quantized = quantize(model, QuantizeConfig(), batches())
    floats = {name for name, part in quantized.named_modules() if type(part) is nn.Linear}
    assert all(name.endswith(("scorer", "region_gate")) for name in floats)
    assert bool(floats) == (levels is not None)


def test_small_tables_scores_and_skipped_modules_stay_float() -> None:
    model = nn.ModuleDict(
        {
            "unit_scorer": nn.Sequential(nn.Linear(5, 7)),
            "types": nn.Embedding(2, 5),
            "score": nn.Linear(5, 1),
            "head": nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)),
            "headless": nn.Linear(5, 7),
            "table": nn.Embedding(16, 5),
            "sparse": nn.Embedding(16, 5, sparse=True),
        }
    )
    assert list(targets(model, QuantizeConfig(skip=("head",)))) == ["headless", "table"]
    assert list(targets(model, QuantizeConfig(skip=("head.1",), quantize_embeddings=False))) == ["head.0", "headless"]


def test_a_star_stands_for_any_text() -> None:
    model = encoder()
    every = [name for name in targets(model, QuantizeConfig()) if ".ffn." in name]
    assert len(every) == 2 * len(model.stack.blocks)
    left = targets(model, QuantizeConfig(skip=("stack.blocks.*.ffn",)))
    assert not set(every) & set(left)
    assert set(left) | set(every) == set(targets(model, QuantizeConfig()))


def test_float_inputs_are_rounded_in_their_weights_alone() -> None:
    model = encoder()
    rounded = quantize(model, QuantizeConfig(float_inputs=("stack.blocks.0.ffn",)), batches())
    reads = {
        name: part.reads.input_scale is not None
        for name, part in rounded.named_modules()
        if isinstance(part, QuantizedLinear)
    }
    assert {name for name, is_rounded in reads.items() if not is_rounded} == {
        "stack.blocks.0.ffn.up",
        "stack.blocks.0.ffn.down",
    }
    part: Any = rounded.get_submodule("stack.blocks.0.ffn.up")
    own: Any = model.get_submodule("stack.blocks.0.ffn.up")
    x = torch.randn(7, own.weight.shape[1])
    step = part.weight_scale.max()
    assert (part.rounded_weight() - own.weight).abs().max() <= 0.51 * step
    torch.testing.assert_close(part(x), torch.nn.functional.linear(x, part.rounded_weight(), own.bias))
    given = batches()[0]
    torch.testing.assert_close(freeze(rounded)(given), rounded(given))


def test_positions_of_patches_are_rounded_and_few_extra_tokens_are_not() -> None:
    from trilevel.model.patches import Patches

    patches = Patches(image_size=(16, 16), patch_size=(4, 4), num_channels=1)
    model = encoder(vocab_size=None, patches=patches, padding_id=None)
    data = [torch.randn(2, 1, 16, 16)]
    quantized = quantize(model, QuantizeConfig(), data)
    tables = {name for name, part in quantized.named_modules() if isinstance(part, QuantizedEmbedding)}
    assert tables == {"embedding.positions"}
    found = quantized(data[0])
    assert 0 < relative(found, model(data[0])) < 0.03
    assert torch.equal(freeze(quantized)(data[0]), found)


def test_a_module_used_twice_stays_one() -> None:
    shared = nn.Linear(5, 5)
    made = quantize(nn.Sequential(shared, nn.ReLU(), shared), QuantizeConfig(), [torch.randn(3, 5)])
    assert made.get_submodule("0") is made.get_submodule("2")
    alone = quantize(shared, QuantizeConfig(), [torch.randn(3, 5)])
    assert isinstance(alone, QuantizedLinear)
    assert isinstance(freeze(alone), FrozenLinear)


def test_ranges_come_from_all_batches_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 5)).train()
    data = [torch.full((1, 3), 2.0), torch.full((2, 4, 3), -6.35)]
    made = quantize(model, QuantizeConfig(smooth=None), iter(data))
    assert made.training
    linear = made.get_submodule("1")
    assert isinstance(linear, QuantizedLinear)
    assert linear.training
    assert float(linear.reads.scale()) == pytest.approx(0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CONFIGS)
def test_training_goes_through_the_rounding(name: str) -> None:
    model, data = encoder(), batches()
    teacher = encoder()
    quantized = quantize(model, CONFIGS[name], data).train()
    wanted = [teacher(batch).detach() for batch in data]

    def loss() -> Tensor:
        return torch.stack([(quantized(b) - y).square().mean() for b, y in zip(data, wanted, strict=True)]).mean()

    first = loss()
    first.backward()
    for key, parameter in quantized.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    learned = [key for key, _ in quantized.named_parameters() if key.endswith(("log_scale", "input_scale"))]
    assert bool(learned) == CONFIGS[name].learned_ranges
    optimizer = torch.optim.AdamW(quantized.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < 0.8 * first
    assert torch.equal(freeze(quantized)(data[1]), quantized(data[1]))
    assert not freeze(quantized).get_submodule("embedding.table")(torch.tensor([0])).any()


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize("in_features", [7, 16])
def test_no_pair_of_weights_overflows_after_training(in_features: int, is_learned: bool) -> None:
    config = QuantizeConfig(learned_ranges=is_learned, smooth=None)
    x = torch.randn(11, in_features)
    model = quantize(nn.Linear(in_features, 13), config, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 9).square().mean().backward()
        optimizer.step()
    frozen = freeze(model)
    assert isinstance(frozen, FrozenLinear)
    pairs = nn.functional.pad(frozen.weight_int8.int().abs(), (0, in_features % 2)).unflatten(1, (-1, 2)).sum(2)
    # none is too large, and no more of the grid is given away than that takes
    assert 120 <= pairs.amax() <= 128
    assert (pairs.amax(1) >= 100).all()
    assert torch.equal(frozen(x), model(x))


def test_learned_ranges_start_where_fixed_ones_stand() -> None:
    model, data = encoder(), batches()
    fixed, learned = (
        quantize(model, QuantizeConfig(learned_ranges=is_learned, smooth=None), data)(data[1])
        for is_learned in (False, True)
    )
    assert relative(learned, fixed) < 1e-2


def test_attention_reads_quantized_maps_as_any_other() -> None:
    model, data = encoder(), batches()
    quantized = quantize(model, QuantizeConfig(), data)
    cost = attention(model).cost(2, 41)
    for made in (quantized, freeze(quantized)):
        assert attention(made).cost(2, 41) == cost
    padded = data[0].clone()
    padded[:, 9:] = 0
    with torch.no_grad():
        alone, row = quantized(padded[:, :9]), run(quantized, padded)[:, :9]
    torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_bfloat16_models_are_defined() -> None:
    data = batches()
    quantized = quantize(encoder().bfloat16(), QuantizeConfig(activations="uint8", smooth=0.5), data)
    out = quantized(data[0])
    assert out.dtype == torch.bfloat16
    assert torch.equal(freeze(quantized)(data[0]), out)


def test_errors_say_what_is_needed() -> None:
    model, data = encoder(), batches()
    with pytest.raises(ConfigError, match="activations='int4' is none of int8, uint8 and None"):
        QuantizeConfig(activations="int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="observer='best' is unknown"):
        QuantizeConfig(observer="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weight_bits=3 must be 8 or 4"):
        QuantizeConfig(weight_bits=3)
    with pytest.raises(ConfigError, match="embedding_bits=7 must be 8 or 4"):
        QuantizeConfig(embedding_bits=7)
    with pytest.raises(ConfigError, match="group_size=48 must be 32, 64 or 128"):
        QuantizeConfig(group_size=48)
    with pytest.raises(ConfigError, match=r"smooth=1\.5 must be 0 to 1"):
        QuantizeConfig(smooth=1.5)
    with pytest.raises(ConfigError, match=r"percentile=10 must be above 50"):
        QuantizeConfig(percentile=10)
    with pytest.raises(ConfigError, match=r"skip names 'stack\.heads', which the model has not"):
        quantize(model, QuantizeConfig(skip=("stack.heads",)), data)
    with pytest.raises(ConfigError, match=r"float_inputs names 'ffn', which the model has not"):
        quantize(model, QuantizeConfig(float_inputs=("ffn",)), data)
    with pytest.raises(ConfigError, match="no calibration batches were given"):
        quantize(model, QuantizeConfig())
    with pytest.raises(ConfigError, match=r"an iterator was given\. Give a list"):
        quantize(model, QuantizeConfig(smooth=0.5), iter(data))
    quantized = quantize(model, QuantizeConfig(), data)
    for again in (quantized, freeze(quantized)):
        with pytest.raises(ConfigError, match=r"embedding\.table is quantized already"):
            quantize(again, QuantizeConfig(), data)
    with pytest.raises(ConfigError, match="no quantized modules to freeze"):
        freeze(model)
    unused = nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 5)])
    with pytest.raises(InputError, match="1 saw no input"):
        quantize(unused, QuantizeConfig(), [torch.randn(2, 3)], lambda part, x: part[0](x))  # type: ignore[index]
    state = freeze(quantized).state_dict()
    with pytest.raises(CheckpointError, match="belong to another model"):
        load_frozen(encoder(num_layers=1), state)


def test_a_draft_computes_what_the_model_does() -> None:
    model, data = encoder(), batches()
    draft = prepare(model, QuantizeConfig(smooth=0.7), data)
    torch.testing.assert_close(draft.model(data[1]), model(data[1]), rtol=1e-4, atol=1e-5)
