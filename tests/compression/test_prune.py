from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compression.models import CASES, DIM, FFN, LEVELS, TOKENS, VOCAB, encoder, sharpen, square_loss, tokens
from trilevel.applications.classification.model import Classifier, ClassifierConfig
from trilevel.applications.documents.model import DocumentConfig, DocumentModel
from trilevel.compression.importance import Criterion, magnitude, prunable_blocks, taylor
from trilevel.compression.keep import Kept, choose
from trilevel.compression.prune import PruneConfig, prune
from trilevel.compression.shrink import prune_encoder
from trilevel.errors import ConfigError, InputError
from trilevel.model.checkpoint import load_checkpoint, read_config, save_checkpoint
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder
from trilevel.model.stack import BlockStack

HALF = PruneConfig(multiple=2)


def classifier() -> Classifier:
    config = ClassifierConfig(encoder=encoder(**CASES["dense_heads"]).config, labels=("a", "b", "c"), max_tokens=TOKENS)
    model = Classifier(config).eval()
    sharpen(model)
    return model


def label_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


LABELLED = [(tokens(seed=seed), torch.tensor([0, 1, 2])) for seed in (1, 2)]

# definition


@pytest.mark.parametrize("case", ["levels", "grouped_strict", "dense_heads", "dense", "gated", "own_sizes"])
def test_pruning_is_choosing_and_slicing(case: str) -> None:
    model, batches = encoder(**CASES[case]), [tokens(seed=3), tokens(seed=4)]
    small, _ = prune(model, HALF, batches, square_loss)
    scores = taylor(model, batches, square_loss)
    kept = choose(
        list(prunable_blocks(model).values()), scores, keep_heads=0.5, keep_ffn=0.5, scope="global", multiple=2
    )
    wanted = prune_encoder(model, kept)
    assert small.config == wanted.config
    assert small(tokens()).equal(wanted(tokens()))


def test_report_says_what_is_left() -> None:
    model = encoder(**CASES["grouped_dense_heads"]).float()
    own = PruneConfig(keep_heads=0.75, keep_ffn=0.5, scope="layer", criterion="magnitude", multiple=4)
    small, report = prune(model, own)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["config"] == {
        "keep_heads": 0.75, "keep_ffn": 0.5, "scope": "layer", "criterion": "magnitude", "multiple": 4, "seed": 0
    }  # fmt: skip
    for side, part in (("before", model), ("after", small)):
        count = sum(parameter.numel() for parameter in part.parameters())
        assert (values[f"parameters_{side}"], values[f"bytes_{side}"]) == (count, 4 * count)
    assert [layer["name"] for layer in values["layers"]] == ["stack.blocks.0", "stack.blocks.1"]
    scores = magnitude(model).groups[0]
    # 8 groups of 2, as 3:2:1 and 2 dense; 6 of them stay, as 2:2:1 and 1
    local = sorted(sorted(range(3), key=lambda group: -float(scores[group]))[:2])
    dense = max((6, 7), key=lambda group: float(scores[group]))
    layer = values["layers"][0]
    assert layer["heads_before"] == {"local": 6, "regional": 4, "global": 2, "dense": 4}
    assert layer["kept_heads"] == {
        "local": [2 * group + place for group in local for place in (0, 1)],
        "regional": [6, 7, 8, 9],
        "global": [10, 11],
        "dense": [2 * dense, 2 * dense + 1],
    }
    assert (layer["channels"], layer["channels_before"]) == (8, FFN)


def test_criteria_choose_otherwise() -> None:
    model = encoder()
    cases: list[tuple[Criterion, int]] = [("taylor", 0), ("magnitude", 0), ("random", 0), ("random", 1)]
    made = [
        prune(model, PruneConfig(criterion=criterion, seed=seed, multiple=2), [tokens()], square_loss)[0](tokens())
        for criterion, seed in cases
    ]
    assert len({float(output.detach().sum()) for output in made}) == 4


def test_taylor_finds_what_does_nothing_however_large_its_weights() -> None:
    model = encoder(activation="relu", is_causal=True)
    with torch.no_grad():
        for block in prunable_blocks(model).values():
            # groups 1, 2 and 4 have no values, channels from 4 on never fire; both have large weights otherwise
            for group in (1, 2, 4):
                rows = slice(6 * group, 6 * group + 6)
                block.attention.in_proj.weight[72:][rows] = 0
                block.attention.in_proj.bias[72:][rows] = 0
                block.attention.out_proj.weight[:, rows] *= 9
            block.ffn.up.bias[4:] = -1e3
            block.ffn.down.weight[:, 4:] *= 9
    own: dict[str, Any] = {"keep_heads": 0.5, "keep_ffn": 0.3, "multiple": 1}
    small, report = prune(model, PruneConfig(**own), [tokens()], square_loss)
    assert [layer.kept_heads for layer in report.layers] == [{"local": (0,), "regional": (3,), "global": (5,)}] * 2
    torch.testing.assert_close(small(tokens()), model(tokens()))
    worse, _ = prune(model, PruneConfig(**own, criterion="magnitude"))
    assert not torch.allclose(worse(tokens()), model(tokens()), rtol=0.1)


# models around an encoder


def test_a_classifier_is_pruned_saved_and_loaded(tmp_path: Path) -> None:
    model = classifier()
    small, report = prune(model, HALF, LABELLED, label_loss)
    assert small.config.encoder == small.encoder.config != model.config.encoder
    assert report.layers[0].name == "encoder.stack.blocks.0"
    save_checkpoint(tmp_path / "small", model=small, config=small.config.to_dict())
    again = Classifier(ClassifierConfig.from_dict(read_config(tmp_path / "small"))).eval()
    load_checkpoint(tmp_path / "small", model=again)
    assert again(tokens()).equal(small(tokens()))
    assert report.parameters_after == sum(parameter.numel() for parameter in again.parameters())


def test_a_document_model_keeps_its_blocks_over_units() -> None:
    own = EncoderConfig(vocab_size=VOCAB, dim=DIM, num_heads=5, num_layers=2, levels=None, ffn_dim=FFN, rope_theta=None)
    model = DocumentModel(DocumentConfig(tokens=own, unit_layers=1, unit_levels=LEVELS))
    small, report = prune(model, PruneConfig(criterion="random", multiple=2))
    assert [layer.name for layer in report.layers] == ["encoder.stack.blocks.0", "encoder.stack.blocks.1"]
    assert isinstance(small.config.tokens, EncoderConfig)
    assert small.config.tokens.num_heads != 5
    again = DocumentModel(DocumentConfig.from_dict(json.loads(json.dumps(small.config.to_dict()))))
    again.load_state_dict(small.state_dict())
    assert small.units.blocks[0].attention.num_heads == 5  # type: ignore[union-attr]


class Shared(nn.Module):
    """One encoder under two names, one under a third."""

    def __init__(self) -> None:
        super().__init__()
        self.left = self.right = encoder()
        self.other = encoder(num_heads=8)


def test_an_encoder_under_two_names_stays_one() -> None:
    small, report = prune(Shared(), PruneConfig(criterion="magnitude", multiple=2))
    assert small.left is small.right
    assert [layer.name for layer in report.layers] == [
        "left.stack.blocks.0", "left.stack.blocks.1", "other.stack.blocks.0", "other.stack.blocks.1"
    ]  # fmt: skip
    # they compete together
    kept = [sum(map(len, layer.kept_heads.values())) for layer in report.layers]
    assert sum(kept) == 14


def test_a_stack_is_pruned_without_configuration() -> None:
    stack = BlockStack(DIM, 5, 2, None, ffn_dim=FFN, rope_theta=None)
    small, _ = prune(stack, PruneConfig(criterion="magnitude", multiple=2, scope="layer"))
    assert isinstance(small, BlockStack)
    assert [block.attention.num_heads for block in prunable_blocks(small).values()] == [3, 3]
    within, _ = prune(nn.Sequential(stack), PruneConfig(criterion="magnitude", multiple=2, scope="layer"))
    x = torch.randn(2, 7, DIM)
    assert within(x).equal(small(x))


# invariants


def test_the_model_is_left_as_it_was() -> None:
    model = classifier()
    state, config, inner = copy.deepcopy(model.state_dict()), model.config, model.encoder
    small, _ = prune(model.train(), HALF, LABELLED, label_loss)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert model.config is config
    assert model.encoder is inner
    assert small.training
    assert small.encoder.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_keeping_all_gives_an_equal_copy() -> None:
    model = classifier()
    all_, report = prune(model, PruneConfig(keep_heads=1.0, keep_ffn=1.0, criterion="magnitude"))
    assert all_ is not model
    assert all_.config == model.config
    assert all_(tokens()).equal(model(tokens()))
    assert report.parameters_after == report.parameters_before


def test_the_same_seed_gives_the_same_model() -> None:
    model = encoder()
    small = [prune(model, PruneConfig(criterion="random", seed=3, multiple=1))[0] for _ in range(2)]
    assert small[0](tokens()).equal(small[1](tokens()))


def test_a_pruned_model_learns() -> None:
    small, _ = prune(classifier(), HALF, LABELLED, label_loss)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = label_loss(small, LABELLED[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# error messages


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keep_heads": 0.0}, r"PruneConfig: keep_heads=0.0 must lie in \(0, 1\]; 1.0 keeps all"),
        ({"keep_ffn": 1.5}, r"PruneConfig: keep_ffn=1.5 must lie in \(0, 1\]"),
        ({"keep_ffn": float("nan")}, r"keep_ffn=nan must lie in"),
        ({"scope": "block"}, "PruneConfig: scope='block' is neither 'global' nor 'layer'"),
        ({"criterion": "fisher"}, "criterion='fisher' is unknown; known are taylor, magnitude, random"),
        ({"multiple": 0}, "PruneConfig: multiple=0 must be >= 1"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PruneConfig(**change)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="criterion='taylor' needs batches and a loss; give both"):
        prune(encoder(), HALF, [tokens()])
    with pytest.raises(InputError, match="needs batches and there are none"):
        prune(encoder(), HALF, loss=square_loss)
    with pytest.raises(ConfigError, match="multiple=16 is more than the 13 channels"):
        prune(encoder(), PruneConfig(criterion="magnitude"))
    with pytest.raises(ConfigError, match="holds no Encoder and no BlockStack"):
        prune(nn.Linear(3, 5), HALF)


def test_kept_of_an_encoder_alone_is_public() -> None:
    model = encoder()
    small: Encoder = prune_encoder(model, Kept(groups=((0, 3, 5),) * 2, channels=((1, 2),) * 2))
    assert small.config.num_heads == 3
