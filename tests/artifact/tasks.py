"""A tiny model of each application, with weights that nobody trained, and texts and images for them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.applications.classification.tiny import COLUMNS, make_source, make_tokenizer
from trilevel.applications.classification.artifact import export_classification
from trilevel.applications.classification.checkpoint import Origin, Run
from trilevel.applications.classification.model import from_source
from trilevel.applications.embedding.artifact import export_embedding
from trilevel.applications.images.artifact import export_images
from trilevel.applications.images.checkpoint import Origin as ImageOrigin
from trilevel.applications.images.checkpoint import Run as ImageRun
from trilevel.applications.images.model import ImageClassifier, ImageClassifierConfig
from trilevel.artifact.manifest import Artifact
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.conversion.source import Source
from trilevel.data.token_rows import pad
from trilevel.model.config import EncoderConfig
from trilevel.model.patches import Patches

TEXTS = ("fine w1 w2", "", "dull w3 w4 w5 dreadful", "w7 " * 40, "lovely", "nothing that it knows")
SIZE = (12, 10)


@cache
def source() -> Source:
    """An encoder of texts of up to 97 tokens."""
    return make_source(seed=3)


@cache
def text_run(*, is_int8: bool = False) -> Run:
    """A text classifier that reads 19 tokens."""
    model: Any = from_source(make_source(seed=4), ("bad", "good", "other"), dropout=0.1, head_rate=10.0)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(5))
    model.eval()
    if is_int8:
        model = freeze(quantize(model, QuantizeConfig(), _batches(), lambda own, batch: own(**batch)))
    origin = Origin(
        encoder="tiny", encoder_sha256="", path="", sha256="", columns=COLUMNS, valid_fraction=0.1, limit=None
    )
    return Run(folder=Path("reviews"), model=model, tokenizer=make_tokenizer(), origin=origin, step=1, steps=1)


def _batches() -> list[dict[str, torch.Tensor]]:
    rows = [one.ids[:19] for one in make_tokenizer().encode_batch([text for text in TEXTS if text])]
    batches = [pad([row], 0) for row in rows]
    return [
        {
            "input_ids": torch.from_numpy(batch["input_ids"]),
            "padding_mask": torch.from_numpy(batch["attention_mask"] == 0),
        }
        for batch in batches
    ]


@cache
def small_image_run() -> ImageRun:
    """The classifier of images with weights of 8 bits that are stored in 4."""
    run = image_run()
    generator = torch.Generator().manual_seed(8)
    batches = [torch.randint(0, 256, (3, 1, *SIZE), dtype=torch.uint8, generator=generator) for _ in range(4)]
    model: Any = freeze(quantize(run.model, QuantizeConfig(weight_bits=4), batches))
    return replace(run, model=model.eval())


@cache
def image_run() -> ImageRun:
    """A classifier of grey images."""
    torch.manual_seed(6)
    config = ImageClassifierConfig(
        encoder=EncoderConfig(
            vocab_size=None,
            dim=24,
            num_heads=3,
            num_layers=2,
            ffn_dim=32,
            levels=Levels(ratio=LevelRatio(1, 1, 1), window=5, region_size=4, num_global_tokens=3),
            patches=Patches(image_size=SIZE, patch_size=(2, 2), num_channels=1, order="hilbert", num_extra_tokens=0),
        ),
        labels=("lying", "standing"),
        mean=(90.0,),
        deviation=(50.0,),
    )
    model = ImageClassifier(config)
    nn.init.normal_(model.head.logits.weight)
    origin = ImageOrigin(path="", sha256="", size=SIZE, valid_fraction=0.1, limit=None)
    return ImageRun(folder=Path("stripes"), model=model.eval(), origin=origin, step=1, steps=1)


def write_pictures(folder: Path) -> list[Path]:
    """Coloured images of the model's size and of others."""
    import PIL.Image

    folder.mkdir(exist_ok=True)
    paths = []
    for place, (height, width) in enumerate((SIZE, (30, 17), (5, 5))):
        pixels = np.random.default_rng(place).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"{place}.png")
        PIL.Image.fromarray(pixels).save(paths[-1])
    return paths


def quiet(_what: str) -> None:
    """Tells nobody."""


def write(kind: str, folder: Path) -> Artifact:
    """The artifact of a model."""
    if kind == "embedding":
        return export_embedding(source(), folder, tell=quiet)
    if kind in ("images", "small-images"):
        return export_images(image_run() if kind == "images" else small_image_run(), folder, tell=quiet)
    return export_classification(text_run(is_int8=kind == "int8"), folder, tell=quiet)
