"""Images of files to an encoder's input: what transformers' processors make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conversion.pretrained import make, save
from trilevel.attention.levels import LevelRatio
from trilevel.conversion.convert import ConvertConfig, convert
from trilevel.conversion.images import Preprocessing, pixels, preprocess, preprocessing_of
from trilevel.conversion.load import load_encoder
from trilevel.conversion.source import Source, load_source
from trilevel.data.images import load_image
from trilevel.errors import CheckpointError, ConfigError, InputError

pil = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra 'convert'")
SIZE = (10, 21)
DICTIONARY = {"height": SIZE[0], "width": SIZE[1]}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(0)
    return load_source(save(make("vit", num_channels=3), tmp_path_factory.mktemp("vit")))


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(0)
    return load_source(save(make("deit", num_channels=3), tmp_path_factory.mktemp("deit")))


def write_images(folder: Path, count: int = 3) -> list[Path]:
    """Smooth images of different sizes, most of them larger than what the encoder reads."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(5)
    paths = []
    for number in range(count):
        small = pil.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        paths.append(folder / f"{number:03}.png")
        small.resize((19 + 2 * number, 41 - number), resample=3).save(paths[-1])
    return paths


def processor(kind: str, **values: Any) -> Any:
    """The processor of transformers that needs no torchvision."""
    module = "vit" if kind == "ViT" else "deit"
    found = pytest.importorskip(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{kind}ImageProcessorPil")(**values)


def theirs(made: Any, path: Path) -> Tensor:
    with pil.open(path) as image:
        found: Tensor = made(image, do_convert_rgb=True, return_tensors="pt")["pixel_values"][0].float()
    return found


# definition: what transformers computes


VIT: list[dict[str, Any]] = [
    {},
    {"resample": 0},
    {"resample": 1},
    {"resample": 3},
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 0.7},
    {"size": {"height": 17, "width": 29}, "do_center_crop": True, "crop_size": DICTIONARY},
    {"do_resize": False, "do_center_crop": True, "crop_size": DICTIONARY},
]


@pytest.mark.parametrize("values", VIT)
@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_pixels_are_those_of_transformers(
    vit: Source, deit: Source, kind: str, values: dict[str, Any], tmp_path: Path
) -> None:
    usual = {"size": DICTIONARY} if kind == "ViT" else {"size": {"height": 15, "width": 23}, "crop_size": DICTIONARY}
    made = processor(kind, **(usual | values))
    made.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    source = vit if kind == "ViT" else deit
    # what the file says, and what the values alone say where the rest has defaults
    for given in (written, usual | values):
        how = preprocessing_of(replace(source, preprocessor=given))
        for path in write_images(tmp_path / "images"):
            found = preprocess(load_image(path), how)
            assert (found.shape, found.dtype) == ((3, *SIZE), torch.float32)
            torch.testing.assert_close(found, theirs(made, path), rtol=1e-6, atol=1e-6)


def test_less_than_the_crop_is_black_around(tmp_path: Path) -> None:
    made = processor("ViT", do_resize=False, do_center_crop=True, crop_size={"height": 47, "width": 20})
    (path, *_) = write_images(tmp_path / "images")
    how = Preprocessing(size=None, crop=(47, 20))
    torch.testing.assert_close(preprocess(load_image(path), how), theirs(made, path), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_defaults_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    source = load_source(save(make("vit", num_channels=3, image_size=224, patch_size=56), tmp_path))
    usual = processor(kind)
    for name in (f"{kind}ImageProcessor", f"{kind}ImageProcessorFast", f"{kind}FeatureExtractor"):
        how = preprocessing_of(replace(source, preprocessor={"image_processor_type": name, "size": None}))
        assert how.size == (usual.size.height, usual.size.width)
        assert how.resample == usual.resample
        assert how.crop == ((usual.crop_size.height, usual.crop_size.width) if usual.do_center_crop else None)
        assert (how.scale, how.mean, how.std) == (usual.rescale_factor, tuple(usual.image_mean), tuple(usual.image_std))


def test_sizes_of_older_files(vit: Source) -> None:
    for size in (list(SIZE), DICTIONARY, DICTIONARY | {"shortest_edge": None}):
        how = preprocessing_of(
            replace(vit, preprocessor={"feature_extractor_type": "ViTFeatureExtractor", "size": size})
        )
        assert how.size == SIZE


def test_without_a_file_vits_defaults_at_the_encoders_size(vit: Source, tmp_path: Path) -> None:
    assert vit.preprocessor is None
    made = processor("ViT", size=DICTIONARY)
    for path in write_images(tmp_path / "images"):
        found = preprocess(load_image(path), preprocessing_of(vit))
        torch.testing.assert_close(found, theirs(made, path), rtol=1e-6, atol=1e-6)


def test_of_many_images_some_spread_over_all_are_read(vit: Source, tmp_path: Path) -> None:
    paths = write_images(tmp_path / "images", 9)
    how = preprocessing_of(vit)
    found = pixels(vit, tmp_path / "images", least=1, most=4)
    assert len(found) == 4
    for place, image in zip((0, 2, 4, 6), found, strict=True):
        assert torch.equal(image, preprocess(load_image(paths[place]), how))


# the whole way


def test_a_converted_vit_keeps_its_preprocessor_and_follows_its_teacher(tmp_path: Path) -> None:
    model = make("vit", num_channels=3)
    folder = save(model, tmp_path / "original")
    original = processor("ViT", size=DICTIONARY, resample=3)
    original.save_pretrained(folder)
    source = load_source(folder)
    images = pixels(source, write_images(tmp_path / "images", 19)[0].parent, least=1, most=99)
    config = ConvertConfig(num_profiled=6, num_held_out=3, steps=60, batch_size=4, learning_rate=1e-3)
    config = replace(config, levels=replace(config.levels, window=1, ratio=LevelRatio(1, 0, 0)))
    made = convert(source, images, config, out=tmp_path / "out", show_progress=False)
    assert made.after.hidden_error < 0.8 * made.before.hidden_error
    assert [cost.tokens for cost in made.costs] == [source.trained_tokens]
    found = load_encoder(tmp_path / "out")
    assert found.preprocessor == source.preprocessor == json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessing_of(found) == preprocessing_of(source)
    with torch.no_grad():
        assert torch.equal(found.encoder(images[0][None]), made.encoder(images[0][None]))
    # transformers reads the copy as well
    assert type(original).from_pretrained(tmp_path / "out").to_dict() == original.to_dict()
    with (tmp_path / "out" / "preprocessor_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        load_encoder(tmp_path / "out")


# messages


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"image_processor_type": "CLIPImageProcessor"},
            "image_processor_type='CLIPImageProcessor'; ViTImageProcessor",
        ),
        ({"do_pad": True}, "do_pad=True, which is not supported"),
        ({"resample": 6}, "resample=6 and .*a filter of 0 to 5"),
        ({"resample": "bicubic"}, "resample='bicubic'; an integer is supported"),
        ({"image_std": [0.5, 0, 0.5]}, r"image_std=\(0\.5, 0\.0, 0\.5\); .*numbers other than 0"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean=\[0\.5, 0\.5\]; a number or 3 is supported"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "a number or 3 is supported"),
        ({"do_rescale": "yes"}, "do_rescale='yes'; true or false"),
        ({"size": {"shortest_edge": 10}}, r"size=\{'shortest_edge': 10\}; an integer or two is supported"),
        ({"size": 0}, "size=0; at least one pixel"),
        ({"size": 224}, r"makes images of \(224, 224\) and config\.json says image_size=\(10, 21\)"),
        ({}, r"makes images of \(224, 224\)"),
    ],
)
def test_what_a_file_may_not_say(vit: Source, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"preprocessor_config.json.*{message}"):
        preprocessing_of(replace(vit, preprocessor=values))


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads images of 2 channels, files give 3"):
        preprocessing_of(load_source(save(make("vit"), tmp_path / "two")))
    with pytest.raises(ConfigError, match=r"\(bert\) reads text, not images"):
        preprocessing_of(load_source(save(make("bert"), tmp_path / "text")))


def test_images_that_do_not_fit_are_named(vit: Source, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    with pytest.raises(InputError, match=r"images has 3 images \(\.png .*\); at least 4 are needed"):
        pixels(vit, tmp_path / "images", least=4, most=9)
    fixed = replace(vit, preprocessor={"do_resize": False, "size": 224})
    with pytest.raises(InputError, match=r"000\.png: \(41, 19\) pixels where the encoder reads \(10, 21\)"):
        pixels(fixed, tmp_path / "images", least=1, most=9)
