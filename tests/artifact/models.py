"""Small models that are exported in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import trilevel
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.manifest import MODEL_FILE, NATIVE, PROBE_FILE, Artifact, Manifest, write_artifact
from trilevel.artifact.probe import Probe, write_probes
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=17, region_size=8, num_global_tokens=5)
AXES: Mapping[str, tuple[int | str, ...]] = {
    "input_ids": ("batch", "tokens"),
    "attention_mask": ("batch", "tokens"),
    "vector": ("batch", 24),
}


class Mean(nn.Module):
    """Mean of the real tokens of an encoder."""

    def __init__(self, levels: Levels | None, num_layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder = Encoder(
            EncoderConfig(vocab_size=53, dim=24, num_heads=3, num_layers=num_layers, levels=levels, max_tokens=512)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, padding_mask=attention_mask == 0)
        real = attention_mask[..., None].to(hidden.dtype)
        mean: Tensor = (hidden * real).sum(1) / real.sum(1)
        return mean


def call(batch: int, tokens: int) -> dict[str, Tensor]:
    """Ids, and a mask under which the last row is three quarters long."""
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, max(1, tokens * 3 // 4) :] = 0
    return {"input_ids": torch.randint(1, 53, (batch, tokens), generator=generator), "attention_mask": mask}


@cache
def mean_model(is_dense: bool = False) -> Mean:
    """The model, in evaluation mode."""
    return Mean(None if is_dense else LEVELS).eval()


def probe(batch: int, tokens: int, *, is_dense: bool = False) -> Probe:
    """Inputs, and what torch makes of them."""
    return _probe(mean_model(is_dense), call(batch, tokens))


def _probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> Probe:
    with torch.no_grad():
        found = model(**inputs)
    return Probe(inputs={name: x.numpy() for name, x in inputs.items()}, outputs={"vector": found.numpy()})


def _copy(source: Path, path: Path) -> None:
    path.write_bytes(source.read_bytes())


@cache
def int8_model() -> nn.Module:
    """A model of one layer with integer weights and activations."""
    batches, config = [call(2, 53), call(3, 17), call(1, 127)], QuantizeConfig()
    return freeze(quantize(Mean(LEVELS, num_layers=1).eval(), config, batches, lambda model, batch: model(**batch)))


def write_mean(folder: Path, *, is_dense: bool = False, is_int8: bool = False, is_native: bool = False) -> Artifact:
    """An artifact of the model."""
    model = int8_model() if is_int8 else mean_model(is_dense)
    graph = folder.with_suffix(".onnx")
    inputs, outputs = export_onnx(model, call(2, 53), AXES, graph, output="vector", is_native=is_native)
    manifest = Manifest(
        task="embedding",
        name="mean",
        trilevel=trilevel.__version__,
        precision="int8" if is_int8 else "float32",
        target=NATIVE if is_native else "portable" if is_int8 else None,
        inputs=inputs,
        outputs=outputs,
    )
    probes = [_probe(model, call(2, 61)), _probe(model, call(1, 7))]
    return write_artifact(
        folder,
        manifest,
        {
            MODEL_FILE: partial(_copy, graph),
            PROBE_FILE: lambda path: write_probes(probes, path),
        },
    )
