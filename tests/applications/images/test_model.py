"""The model, its losses and its batches."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trilevel.applications.images.batches import ImageBatches, augment
from trilevel.applications.images.model import Classified, ImageClassifier, ImageClassifierConfig
from trilevel.applications.images.objective import LossConfig, distilled, supervised
from trilevel.applications.images.score import logits_of, with_channels
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.compression.distill import distance, divergence
from trilevel.errors import ConfigError, InputError, ShapeError
from trilevel.model.config import EncoderConfig
from trilevel.model.encoder import Encoder
from trilevel.model.patches import Patches
from trilevel.model.weights import copy_shared

PATCHES = Patches(image_size=(6, 10), patch_size=(2, 2), num_channels=3, num_extra_tokens=0)
CONFIG = ImageClassifierConfig(
    encoder=EncoderConfig(
        vocab_size=None, dim=15, num_heads=3, num_layers=2, levels=None, rope_theta=None, patches=PATCHES
    ),
    labels=("a", "b"),
    mean=(10.0, 20.0, 30.0),
    deviation=(5.0, 7.0, 11.0),
)
LEVELS = Levels(ratio=LevelRatio(4, 4, 2), window=3, region_size=4, num_global_tokens=2)


def make(**changes: Any) -> ImageClassifier:
    encoder = dataclasses.replace(CONFIG.encoder, **changes)
    model = ImageClassifier(dataclasses.replace(CONFIG, encoder=encoder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(count: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 6, 10), dtype=torch.uint8)


# definition


def test_logits_are_a_map_of_the_mean_of_normalised_patches() -> None:
    model, given = make(levels=LEVELS), pixels()
    normal = (given.float() - torch.tensor(CONFIG.mean)[:, None, None]) / torch.tensor(CONFIG.deviation)[:, None, None]
    hidden = model.encoder(normal)
    wanted = F.linear(hidden.mean(1), model.head.logits.weight, model.head.logits.bias)
    torch.testing.assert_close(model(given), wanted)
    found = model(given, return_hidden=True)
    assert isinstance(found, Classified)
    torch.testing.assert_close(found.hidden, hidden)
    torch.testing.assert_close(model(given.float()), wanted)


def test_positions_start_as_sines_of_row_and_column() -> None:
    found = ImageClassifier(CONFIG).encoder.embedding.positions.weight.detach()
    assert found.shape == (15, 15)
    rates = [1.0, 0.01, 0.0001]
    for row in range(3):
        for column in range(5):
            wanted = [wave(axis * rate) for axis in (row, column) for wave in (math.sin, math.cos) for rate in rates]
            assert found[5 * row + column].tolist() == pytest.approx([*wanted, 0, 0, 0], abs=1e-6)


def test_scorers_and_pooling_start_as_the_encoder_has_them() -> None:
    torch.manual_seed(3)
    model = ImageClassifier(dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, levels=LEVELS)))
    torch.manual_seed(3)
    encoder = Encoder(model.config.encoder)
    found, plain = model.encoder.state_dict(), encoder.state_dict()
    changed = {re.sub(r"stack\.blocks\.\d\.", "", name) for name in plain if not torch.equal(found[name], plain[name])}
    maps = {f"{part}.weight" for part in ("attention.in_proj", "attention.out_proj", "ffn.up", "ffn.down")}
    assert changed == maps | {"embedding.projection.weight", "embedding.positions.weight"}
    assert float(found["stack.blocks.0.ffn.up.weight"].abs().max()) <= math.sqrt(6 / (15 + 60))


def test_a_new_model_finds_all_classes_nearly_alike() -> None:
    assert 0 < ImageClassifier(CONFIG)(pixels()).abs().max() < 0.5


def test_the_configuration_survives_json() -> None:
    for levels in (None, LEVELS):
        config = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, levels=levels))
        assert ImageClassifierConfig.from_dict(config.to_dict()) == config


def test_scores_come_in_order_and_in_the_models_channels() -> None:
    model, given = make(), pixels(131)
    told: list[int] = []
    found = logits_of(model, given.numpy(), on_progress=told.append)
    torch.testing.assert_close(found[-3:], model(given[-3:]))
    assert told == [128, 131]
    grey = pixels()[:, :1]
    torch.testing.assert_close(logits_of(model, grey.numpy()), model(grey.expand(-1, 3, -1, -1)))


def test_grey_is_what_pillow_makes_of_colours() -> None:
    pil = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra 'images'")
    given = pixels(1)
    wanted = np.array(pil.fromarray(given[0].permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(with_channels(given, 1)[0, 0].numpy().astype(int) - wanted).max() <= 1
    # grey stays what it is
    assert torch.equal(with_channels(with_channels(given[:, :1], 3), 1), given[:, :1])


# losses


def test_divergence_is_kullback_leiblers() -> None:
    student, teacher = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    wanted = 4 * (p * (p / q).log()).sum(-1).mean()
    assert float(divergence(student, teacher, 2.0)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(divergence(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)


def test_distance_is_a_share() -> None:
    teacher = torch.randn(3, 5, 7)
    assert float(distance(torch.zeros_like(teacher), teacher)) == pytest.approx(1)
    assert float(distance(100 * teacher, 100 * teacher)) == 0


def test_supervised_and_distilled() -> None:
    loss = LossConfig(label_smoothing=0.2, temperature=3.0, teacher_weight=0.25, hidden_weight=0.5)
    student = make(levels=LEVELS)
    teacher = make(patches=dataclasses.replace(PATCHES, order="hilbert"))
    batch = {"pixels": pixels(), "labels": torch.tensor([0, 1, 1, 0, 1, 0, 0])}
    alone = supervised(loss)(student, batch)
    logits = student(batch["pixels"])
    torch.testing.assert_close(alone["loss"], F.cross_entropy(logits, batch["labels"], label_smoothing=0.2))
    found = distilled(loss, teacher, student, bfloat16=False)(student, batch)
    torch.testing.assert_close(found["cross_entropy"], alone["loss"])
    wanted = 0.75 * found["cross_entropy"] + 0.25 * found["divergence"] + 0.5 * found["hidden"]
    torch.testing.assert_close(found["loss"], wanted)
    # one order against another: the same weights are no distance apart
    copy_shared(student, teacher)
    dense = make()
    copy_shared(student, dense)
    same = distilled(loss, teacher, dense, bfloat16=False)(dense, batch)
    assert same["hidden"].item() == pytest.approx(0, abs=1e-9)
    found["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


# batches


def batches(**options: Any) -> ImageBatches:
    images = np.arange(17, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 3, 6, 10), np.uint8)
    return ImageBatches(images, np.arange(17) % 2, np.arange(2, 17), **({"batch_size": 4} | options))


def test_an_epoch_shows_each_image_at_most_once() -> None:
    found = batches()
    assert found.steps_of_epoch == 3
    for epoch in range(3):
        seen = [int(image[0, 0, 0]) for step in range(3) for image in found.batch(3 * epoch + step)["pixels"]]
        assert len(set(seen)) == 12
        assert min(seen) >= 2
    first = found.batch(4)
    again = batches().batch(4)
    assert torch.equal(first["pixels"], again["pixels"])
    assert torch.equal(first["labels"], first["pixels"][:, 0, 0, 0].long() % 2)
    assert not torch.equal(batches(seed=1).batch(4)["pixels"], first["pixels"])
    assert batches(batch_size=100).steps_of_epoch == 1


def test_shifts_and_mirrors() -> None:
    image = np.random.default_rng(1).integers(1, 256, (3, 6, 10), dtype=np.uint8)
    count, most = 400, 2
    found = augment(np.repeat(image[None], count, axis=0), crop_padding=most, flip=True, rng=np.random.default_rng(5))
    padded = np.pad(image, [(0, 0), (most, most), (most, most)])
    views = {}
    for down in range(2 * most + 1):
        for right in range(2 * most + 1):
            view = padded[:, down : down + 6, right : right + 10]
            views[view.tobytes()] = (down, right, False)
            views[view[..., ::-1].tobytes()] = (down, right, True)
    seen = [views[one.tobytes()] for one in found]
    # all 50 of them, about half mirrored
    assert len(set(seen)) == 50
    assert 150 < sum(mirrored for *_, mirrored in seen) < 250
    plain = augment(found, crop_padding=0, flip=False, rng=np.random.default_rng(5))
    assert np.array_equal(plain, found)


# messages


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": ("a",)}, "two or more different names"),
        ({"labels": ("a", "a")}, "two or more different names"),
        ({"mean": (1.0,)}, "must hold 3 numbers"),
        ({"deviation": (1.0, 0.0, 1.0)}, "the deviations above 0"),
        ({"dropout": 1.0}, r"dropout=1\.0 must lie in"),
        ({"encoder": EncoderConfig(vocab_size=3, dim=4, num_heads=2, num_layers=1, levels=None)}, "with patches"),
    ],
)
def test_bad_configurations(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        dataclasses.replace(CONFIG, **change)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="an encoder table is needed"):
        ImageClassifierConfig.from_dict({})
    with pytest.raises(ConfigError, match="a list 'labels' is needed"):
        ImageClassifierConfig.from_dict({"encoder": CONFIG.encoder.to_dict()})
    with pytest.raises(ShapeError, match=r"\(batch, 3, height, width\) is needed"):
        make()(pixels()[:, :1])
    with pytest.raises(InputError, match="no images to make batches of"):
        ImageBatches(np.zeros((1, 1, 2, 2), np.uint8), np.zeros(1), np.zeros(0, int), batch_size=1)
    for bad in ({"batch_size": 0}, {"crop_padding": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            batches(**bad)
