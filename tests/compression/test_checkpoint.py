"""Compressed checkpoints: the same outputs bit for bit, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.compression.models import encoder, tokens
from trilevel.compression.checkpoint import holds_integers, load_compressed
from trilevel.compression.layers import FrozenLinear
from trilevel.compression.prune import PruneConfig, prune
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.errors import CheckpointError
from trilevel.model.checkpoint import save_checkpoint
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

FOUR_BITS = QuantizeConfig(activations=None, weight_bits=4, smooth=None)


def compressed(config: QuantizeConfig | None) -> Encoder:
    smaller, _ = prune(encoder(), PruneConfig(keep_heads=0.7, keep_ffn=0.6, multiple=1, criterion="magnitude"))
    if config is None:
        return smaller
    frozen = freeze(quantize(smaller, config, [tokens()])).eval()
    assert isinstance(frozen, Encoder)
    return frozen


@pytest.mark.parametrize(
    "config", [None, QuantizeConfig(), QuantizeConfig(activations="uint8", observer="mse"), FOUR_BITS]
)
def test_round_trip(config: QuantizeConfig | None, tmp_path: Path) -> None:
    model = compressed(config)
    save_checkpoint(tmp_path / "c", model=model, config=model.config.to_dict(), state={"step": 7})
    empty = Encoder(EncoderConfig.from_dict(model.config.to_dict())).double().eval()
    loaded, checkpoint = load_compressed(tmp_path / "c", empty)
    assert checkpoint.state == {"step": 7}
    assert torch.equal(loaded(tokens()), model(tokens()))
    assert any(isinstance(part, FrozenLinear) for part in loaded.modules()) == (config not in (None, FOUR_BITS))


def test_integers_are_told_by_their_names() -> None:
    assert holds_integers(["a.weight", "b.weight_int8"])
    assert holds_integers(["packed"])
    assert not holds_integers(["unpacked", "packed.weight", "weight_int8.bias"])


def test_damaged_or_of_another_model(tmp_path: Path) -> None:
    model = compressed(QuantizeConfig())
    save_checkpoint(tmp_path / "c", model=model, config={})
    with pytest.raises(CheckpointError, match="the stored weights belong to another model"):
        load_compressed(tmp_path / "c", encoder())
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_compressed(tmp_path / "none", encoder())
    file = tmp_path / "c" / "model.safetensors"
    for damaged in (file.read_bytes()[:-1] + b"\1", b"short", b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="was changed or damaged"):
            load_compressed(tmp_path / "c", encoder())
    file.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        load_compressed(tmp_path / "c", nn.Linear(2, 3))
