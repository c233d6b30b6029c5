"""The classifier against its formula, under padding, and its configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.applications.classification.tiny import LEVELS, TRAINED_TOKENS, make_source
from trilevel.applications.classification.model import Classifier, ClassifierConfig, from_source
from trilevel.applications.classification.score import logits_of
from trilevel.conversion.sentence import Pooling
from trilevel.errors import ConfigError, InputError

LABELS = ("a", "b", "c")


def make(pooling: Pooling = "mean", **options: Any) -> Classifier:
    given: dict[str, Any] = {"dropout": 0.1, "head_rate": 7.0} | options
    model = from_source(make_source(pooling=pooling), LABELS, **given).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head.bias)
    return model


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_definition(pooling: Pooling) -> None:
    model = make(pooling)
    ids = torch.randint(4, 20, (3, 11))
    mask = torch.arange(11) >= torch.tensor([[11], [7], [2]])
    hidden = model.encoder(ids, padding_mask=mask)
    rows = [row[:length] for row, length in zip(hidden, (11, 7, 2), strict=True)]
    vectors = torch.stack([row[0] if pooling == "cls" else row.mean(0) for row in rows])
    expected = 7.0 * (vectors @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(model(ids, padding_mask=mask), expected)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_nothing(pooling: Pooling) -> None:
    model = make(pooling)
    lengths = [3, 17, 5, 1, 12]
    sequences = [torch.randint(4, 20, (length,)) for length in lengths]
    alone = torch.cat([model(sequence[None]) for sequence in sequences])
    assert alone.std(0).min() > 1e-3
    torch.testing.assert_close(logits_of(model, sequences), alone.detach(), rtol=1e-4, atol=1e-5)


def test_it_starts_undecided_with_the_weights_of_the_encoder() -> None:
    source = make_source()
    model = from_source(source, LABELS, dropout=0.0, head_rate=10.0)
    assert model.encoder is source.encoder
    assert (model(torch.randint(4, 20, (2, 5))) == 0).all()
    assert model.config.max_tokens == TRAINED_TOKENS


def test_the_configuration_goes_to_json_and_back_with_levels() -> None:
    config = make().config
    again = ClassifierConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.encoder.levels == LEVELS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("a",)}, "labels"),
        ({"labels": ("a", "a")}, "labels"),
        ({"max_tokens": 98}, "max_tokens=98 must lie in 4 to 97"),
        ({"max_tokens": 3}, "max_tokens=3"),
        ({"pooling": "max"}, "neither 'mean' nor 'cls'"),
        ({"dropout": 1.0}, "dropout"),
        ({"head_rate": 0.0}, "head_rate"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    config = make().config
    values = {name: getattr(config, name) for name in ClassifierConfig.__dataclass_fields__}
    with pytest.raises(ConfigError, match=message):
        ClassifierConfig(**(values | change))


def test_an_encoder_of_images_is_refused() -> None:
    source = make_source()
    images = type(source)(**{name: getattr(source, name) for name in source.__dataclass_fields__} | {"tokenizer": None})
    with pytest.raises(InputError, match="reads images"):
        from_source(images, LABELS, dropout=0.0, head_rate=1.0)
