"""Small models that are exported in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import trilevel
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.manifest import MODEL_FILE, PROBE_FILE, Artifact, Manifest, write_artifact
from trilevel.artifact.probe import Probe, write_probes
from trilevel.attention.levels import LevelRatio, Levels
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

    def __init__(self, levels: Levels | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        config = EncoderConfig(vocab_size=53, dim=24, num_heads=3, num_layers=2, levels=levels, max_tokens=512)
        self.encoder = Encoder(config)

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
    inputs = call(batch, tokens)
    with torch.no_grad():
        found = mean_model(is_dense)(**inputs)
    return Probe(inputs={name: x.numpy() for name, x in inputs.items()}, outputs={"vector": found.numpy()})


def _copy(source: Path, path: Path) -> None:
    path.write_bytes(source.read_bytes())


def write_mean(folder: Path, *, is_dense: bool = False) -> Artifact:
    """An artifact of the model."""
    model = mean_model(is_dense)
    graph = folder.with_suffix(".onnx")
    inputs, outputs = export_onnx(model, call(2, 53), AXES, graph, output="vector")
    manifest = Manifest(
        task="embedding",
        name="mean",
        trilevel=trilevel.__version__,
        precision="float32",
        target=None,
        inputs=inputs,
        outputs=outputs,
    )
    probes = [probe(2, 61, is_dense=is_dense), probe(1, 7, is_dense=is_dense)]
    return write_artifact(
        folder,
        manifest,
        {
            MODEL_FILE: partial(_copy, graph),
            PROBE_FILE: lambda path: write_probes(probes, path),
        },
    )
