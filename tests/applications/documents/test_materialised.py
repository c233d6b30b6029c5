"""Materialised attention is dense attention, and takes the memory it is said to take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from trilevel.applications.documents.materialised import (
    MaterialisedAttention,
    longest_that_fits,
    materialise,
    materialised_bytes,
)
from trilevel.attention.layer import MultiLevelAttention
from trilevel.attention.levels import Levels
from trilevel.errors import ConfigError


@pytest.mark.parametrize("padded", [0, 4])
def test_it_equals_sdpa(padded: int) -> None:
    layer = MultiLevelAttention(24, 3, levels=None, rope_theta=1e4)
    x = torch.randn(2, 17, 24)
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[1, 17 - padded :] = True
    with torch.inference_mode():
        wanted = layer(x, padding_mask=mask if padded else None)
        found = MaterialisedAttention(layer)(x, padding_mask=mask if padded else None, global_prior=torch.zeros(2, 17))
    torch.testing.assert_close(found[~mask], wanted[~mask], atol=1e-5, rtol=1e-4)


def test_every_layer_of_a_model_is_replaced() -> None:
    model = nn.Sequential(nn.Sequential(MultiLevelAttention(8, 2, levels=None)), MultiLevelAttention(8, 2, levels=None))
    before = model(torch.ones(1, 5, 8))
    assert materialise(model) is model
    assert sum(isinstance(part, MaterialisedAttention) for part in model.modules()) == 2
    torch.testing.assert_close(model(torch.ones(1, 5, 8)), before)


@pytest.mark.parametrize(
    "layer",
    [
        MultiLevelAttention(8, 4, levels=Levels()),
        MultiLevelAttention(8, 2, levels=None, is_causal=True),
        MultiLevelAttention(8, 2, levels=None, num_kv_heads=1),
    ],
)
def test_other_layers_are_refused(layer: MultiLevelAttention) -> None:
    with pytest.raises(ConfigError, match="a dense bidirectional layer"):
        MaterialisedAttention(layer)


def test_the_longest_length_fits_and_one_more_does_not() -> None:
    memory = 123_456_789
    tokens = longest_that_fits(7, memory)
    assert materialised_bytes(7, tokens) <= memory < materialised_bytes(7, tokens + 1)


# a process of its own: the heap of one that ran other tests may hold a freed block, large enough and still resident
PEAK = """
import torch
from trilevel.applications.documents.materialised import MaterialisedAttention
from trilevel.applications.documents.memory import peak_bytes, reset_peak
from trilevel.attention import MultiLevelAttention

layer = MaterialisedAttention(MultiLevelAttention(28, 7, levels=None))
x = torch.randn(1, {tokens}, 28)
with torch.inference_mode():
    layer(x[:, :5])
    reset_peak()
    before = peak_bytes()
    layer(x)
    print(peak_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_what_was_computed() -> None:
    code = PEAK.format(tokens=1307)
    risen = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert risen == pytest.approx(materialised_bytes(7, 1307), rel=0.05)
