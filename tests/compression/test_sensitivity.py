"""Layers quantized one at a time, and the choice of those to leave float."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trilevel.compression.quantize import QuantizeConfig, quantize
from trilevel.compression.sensitivity import LayerLoss, choose_skips, sensitivity
from trilevel.errors import ConfigError

X = torch.randn(61, 11, generator=torch.Generator().manual_seed(1))


def model() -> nn.Sequential:
    """The second map reads a feature far larger than the others."""
    made = nn.Sequential(nn.Linear(11, 7), nn.Linear(7, 5), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        made.get_parameter("0.weight")[2] *= 300
        made.get_parameter("1.weight")[:, 2] /= 300
    return made


@pytest.mark.parametrize("smooth", [None, 0.5])
def test_each_layer_is_quantized_alone(smooth: float | None) -> None:
    original = model()
    wanted = original(X)

    @torch.no_grad()
    def quality(made: nn.Module) -> float:
        return -float((made(X) - wanted).norm())

    config = QuantizeConfig(observer="minmax", smooth=smooth)
    rows = sensitivity(original, config, [X], quality)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    assert {row["name"] for row in rows} == {"0", "1", "2"}
    if smooth is not None:
        return
    assert rows[0]["name"] == "1"
    for row in rows:
        others = tuple(name for name in ("0", "1", "2") if name != row["name"])
        alone = quantize(original, QuantizeConfig(smooth=None, skip=others), [X])
        assert row["loss"] == pytest.approx(-quality(alone), rel=1e-4)
    sizes = {row["name"]: row["bytes_saved"] for row in rows}
    # floats less integers, a scale for each output, scale and zero point of the input
    assert sizes["0"] == 4 * 77 - 77 - 4 * 7 - 5


def row(name: str, loss: float, bytes_saved: int) -> LayerLoss:
    return LayerLoss(name=name, kind="linear", loss=loss, bytes_saved=bytes_saved)


ROWS = st.lists(st.tuples(st.integers(-3, 20), st.integers(1, 50)), min_size=1, max_size=6).map(
    lambda pairs: [row(str(place), loss / 8, size) for place, (loss, size) in enumerate(pairs)]
)


@given(ROWS, st.integers(0, 40))
def test_skips_keep_the_budget_and_none_is_needless(rows: list[LayerLoss], eighths: int) -> None:
    budget = eighths / 8
    skipped = choose_skips(rows, budget)

    def left(names: tuple[str, ...]) -> float:
        return sum(max(0.0, one["loss"]) for one in rows if one["name"] not in names)

    assert left(skipped) <= budget
    for fewer in itertools.combinations(skipped, len(skipped) - 1) if skipped else ():
        assert left(fewer) > budget


def test_large_layers_are_kept_when_small_ones_do() -> None:
    rows = [row("table", 0.03, 1_000), row("up", 0.02, 10), row("down", 0.001, 10)]
    assert choose_skips(rows, 0.035) == ("up",)
    assert choose_skips(rows, 1.0) == ()
    assert set(choose_skips(rows, 0.0)) == {"table", "up", "down"}
    with pytest.raises(ConfigError, match=r"budget=-1 must not be negative"):
        choose_skips(rows, -1)
