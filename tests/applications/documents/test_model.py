"""The model: shapes, padding, the dense twin, focus, what a layer looked at, configuration."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from trilevel.applications.documents.data import DocumentBatch, collate
from trilevel.applications.documents.encoded import encode
from trilevel.applications.documents.model import TOKEN_LEVELS, DocumentConfig, DocumentModel, default_config
from trilevel.applications.documents.objective import objective, oracle_loss
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.data.documents import Document
from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig


@pytest.fixture
def batch(document: Document, tokenizer: DocumentTokenizer) -> DocumentBatch:
    encoded = encode(split_units(document), tokenizer, abstract=document.abstract)
    return collate([encoded, encoded.cut(61)])


def test_scores_of_every_unit(model: DocumentModel, batch: DocumentBatch) -> None:
    scores = model(batch)
    assert scores.shape == batch["unit_padding"].shape
    assert torch.isfinite(scores).all()


def test_padding_changes_nothing(model: DocumentModel, document: Document, tokenizer: DocumentTokenizer) -> None:
    encoded = encode(split_units(document), tokenizer).cut(61)
    long = encode(split_units(document), tokenizer)
    alone = model(collate([encoded]))[0]
    padded = model(collate([long, encoded]))[1]
    torch.testing.assert_close(alone, padded[: len(alone)], atol=1e-5, rtol=1e-4)


def test_the_dense_twin_shares_weights_and_equals_where_the_window_covers_all(
    model: DocumentModel, document: Document, tokenizer: DocumentTokenizer
) -> None:
    twin = model.dense()
    assert twin.config.is_dense
    assert not model.config.is_dense
    names = dict(model.named_parameters())
    assert all(torch.equal(weight, names[name]) for name, weight in twin.named_parameters())
    short = collate([encode(split_units(document), tokenizer).cut(15)])
    torch.testing.assert_close(model(short), twin(short), atol=1e-5, rtol=1e-4)


def test_both_start_from_nearly_the_same_function(tokenizer: DocumentTokenizer, batch: DocumentBatch) -> None:
    torch.manual_seed(0)
    fresh = DocumentModel(default_config(tokenizer.vocab_size)).eval()
    torch.testing.assert_close(fresh(batch), fresh.dense()(batch), atol=1e-6, rtol=0)


def test_focus_keeps_a_share_of_the_units(model: DocumentModel, batch: DocumentBatch) -> None:
    details = model.details(batch, focus_fraction=0.2, explain=False)
    assert details.tokens is not None
    assert details.tokens.kept_units is not None
    units = (~batch["unit_padding"]).sum(dim=1)
    assert details.tokens.kept_units.sum(dim=1).tolist() == [-(-int(n) // 5) for n in units]
    assert torch.isfinite(details.scores).all()


def test_focus_on_all_equals_no_focus(model: DocumentModel, batch: DocumentBatch) -> None:
    assert torch.equal(model(batch), model(batch, focus_fraction=1.0))


def test_explanations_name_global_tokens(model: DocumentModel, batch: DocumentBatch) -> None:
    explained = model.details(batch)
    assert explained.tokens is not None
    assert len(explained.tokens.explanations) == 2
    assert len(explained.units.explanations) == 2
    prior = explained.tokens.explanations[0].global_prior[0]
    valid = explained.tokens.explanations[0].global_valid[0]
    # titles and headings come first among the global tokens
    assert prior[valid].max() == 2.0


def test_hidden_words_in_training_only(model: DocumentModel, batch: DocumentBatch) -> None:
    assert torch.equal(model(batch), model(batch))
    model.train()
    assert not torch.equal(model(batch), model(batch))


def test_gradients_reach_every_part(model: DocumentModel, batch: DocumentBatch) -> None:
    losses = objective(focus_weight=0.2)(model, batch)
    losses["loss"].backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert not without


def test_loss_is_least_at_the_oracle(batch: DocumentBatch) -> None:
    scores = torch.zeros_like(batch["oracle"])
    assert oracle_loss(scores + 20 * batch["oracle"], batch) < oracle_loss(scores, batch)
    # scores of units that cannot be chosen do not count
    odd = scores.masked_fill(~batch["unit_selectable"], torch.inf)
    assert oracle_loss(odd, batch) == oracle_loss(scores, batch)
    blank: DocumentBatch = {**batch, "oracle": torch.zeros_like(batch["oracle"])}
    assert oracle_loss(scores, blank) == 0


def test_config_goes_to_json_and_back(tokenizer: DocumentTokenizer) -> None:
    for config in (default_config(tokenizer.vocab_size), default_config(tokenizer.vocab_size).dense()):
        assert DocumentConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_and_bad_share() -> None:
    values = default_config(101).to_dict()
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        DocumentConfig.from_dict({**values, "colour": 1})
    with pytest.raises(ConfigError, match=r"word_dropout=1.0"):
        DocumentConfig.from_dict({**values, "word_dropout": 1.0})


def test_focus_scores_without_focus(batch: DocumentBatch, tokenizer: DocumentTokenizer) -> None:
    config = default_config(tokenizer.vocab_size)
    assert isinstance(config.tokens, EncoderConfig)
    plain = DocumentModel(dataclasses.replace(config, tokens=dataclasses.replace(config.tokens, focus=None)))
    assert plain(batch).shape == batch["oracle"].shape
    with pytest.raises(ConfigError, match="no focus"):
        plain(batch, with_focus_scores=True)


def test_other_levels_keep_the_weights(model: DocumentModel, batch: DocumentBatch) -> None:
    wide = model.with_levels(dataclasses.replace(TOKEN_LEVELS, window=401), model.config.unit_levels)
    assert torch.isfinite(wide(batch)).all()
    assert torch.equal(wide.score.weight, model.score.weight)
