"""Images to what an encoder reads, as the preprocessor_config.json of its source says.

The same numbers as transformers' `ViTImageProcessorPil` and `DeiTImageProcessorPil`; the processors on torchvision
differ from those by their resampling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trilevel.conversion.profile import Progress
from trilevel.conversion.settings import Settings
from trilevel.conversion.source import PREPROCESSOR_FILE, Source
from trilevel.data.images import BILINEAR, SUFFIXES, find_images, load_image, resize
from trilevel.errors import ConfigError, InputError
from trilevel.model.patches import Patches

CHANNELS = 3
_NUM_FILTERS = 6
"""Of Pillow: nearest, Lanczos, bilinear, bicubic, box, Hamming."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"size": 224, "resample": BILINEAR, "do_center_crop": False, "crop_size": 224},
    "DeiT": {"size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224},
}
"""Of the processors in transformers; what they have in common are the defaults of `Preprocessing`."""
_PROCESSOR = re.compile(r"(ViT|DeiT)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What is done to an image, in this order.

    Attributes:
        size: height and width that it is resized to; None leaves it.
        resample: Pillow's number of the filter.
        crop: height and width cut from its middle, black where it has less; None leaves it.
        scale: what its bytes are multiplied by.
        mean, std: for each channel: the one is subtracted, then divided by the other.
    """

    size: tuple[int, int] | None
    resample: int = BILINEAR
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5,) * CHANNELS
    std: tuple[float, ...] = (0.5,) * CHANNELS


def preprocessing_of(source: Source) -> Preprocessing:
    """What a source says; without its preprocessor_config.json ViT's defaults at the source's own size.

    Raises:
        ConfigError: the source does not read coloured images; its file asks for what is not supported, or makes images
            of another size than the encoder reads.
    """
    patches = _patches(source)
    if patches.num_channels != CHANNELS:
        raise ConfigError(
            f"{source.name} reads images of {patches.num_channels} channels, files give {CHANNELS} (red, green, blue). "
            "Call trilevel.conversion.convert.convert with tensors."
        )
    if source.preprocessor is None:
        return Preprocessing(size=patches.image_size)
    # null is as good as absent
    given = {name: value for name, value in source.preprocessor.items() if value is not None}
    found = _read(Settings(_defaults(given, source.family) | given, file=PREPROCESSOR_FILE))
    made = found.crop or found.size
    if made not in (None, patches.image_size):
        raise ConfigError(
            f"{PREPROCESSOR_FILE} makes images of {made} and config.json says image_size={patches.image_size} (height, "
            f"width). Correct {PREPROCESSOR_FILE}, or take it away for ViT's defaults."
        )
    return found


def _patches(source: Source) -> Patches:
    patches = source.encoder.config.patches
    if patches is None:
        raise ConfigError(f"{source.name} ({source.family}) reads text, not images. Choose a ViT or DeiT.")
    return patches


def _defaults(given: Mapping[str, Any], family: str) -> dict[str, Any]:
    usual = {"vit": "ViTImageProcessor", "deit": "DeiTImageProcessor"}[family]
    kind = given.get("image_processor_type", given.get("feature_extractor_type", usual))
    match = _PROCESSOR.fullmatch(str(kind))
    if match is None:
        raise ConfigError(
            f"{PREPROCESSOR_FILE} has image_processor_type={kind!r}; ViTImageProcessor and DeiTImageProcessor are "
            "supported. Call trilevel.conversion.convert.convert with tensors."
        )
    return _DEFAULTS[match.group(1)]


def _read(settings: Settings) -> Preprocessing:
    settings.refuse("do_pad", unless=False)
    usual = Preprocessing(size=None)
    resample = settings.number("resample")
    std = settings.reals("image_std", usual.std)
    if not 0 <= resample < _NUM_FILTERS or 0 in std:
        raise ConfigError(
            f"{PREPROCESSOR_FILE} has resample={resample} and image_std={std}; a filter of 0 to {_NUM_FILTERS - 1} and "
            "numbers other than 0 are needed. Download the model again."
        )
    rescaled, normalized = (settings.flag(name, default=True) for name in ("do_rescale", "do_normalize"))
    return Preprocessing(
        size=_size(settings, "size") if settings.flag("do_resize", default=True) else None,
        resample=resample,
        crop=_size(settings, "crop_size") if settings.flag("do_center_crop", default=False) else None,
        scale=settings.real("rescale_factor", usual.scale) if rescaled else 1.0,
        mean=settings.reals("image_mean", usual.mean) if normalized else (0.0,) * CHANNELS,
        std=std if normalized else (1.0,) * CHANNELS,
    )


def _size(settings: Settings, name: str) -> tuple[int, int]:
    value = settings.values[name]
    if isinstance(value, Mapping) and {side for side in value if value[side] is not None} == {"height", "width"}:
        settings = Settings({name: (value["height"], value["width"])}, file=settings.file)
    found = settings.pair(name, 0)
    if min(found) < 1:
        raise ConfigError(f"{PREPROCESSOR_FILE} has {name}={value!r}; at least one pixel is needed.")
    return found


def preprocess(image: Tensor, how: Preprocessing) -> Tensor:
    """Bytes (3, height, width) to float32 (3, height, width)."""
    if how.size is not None:
        image = resize(image, how.size, resample=how.resample)
    if how.crop is not None:
        image = _center_crop(image, how.crop)
    # in float64 as transformers does, then rounded once
    values = (image.double() * how.scale).float()
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (how.mean, how.std))
    return (values - mean) / std


def _center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((has - wanted) // 2 for has, wanted in zip(image.shape[1:], size, strict=True))
    bottom, right = size[0] - image.shape[1] + top, size[1] - image.shape[2] + left
    # less than nothing is cut away
    return F.pad(image, (-left, right, -top, bottom))


def pixels(
    source: Source,
    folder: str | Path,
    *,
    least: int,
    most: int,
    progress: Progress = lambda _what, _done: None,
) -> list[Tensor]:
    """What an encoder reads for the images in a folder, float32 (3, height, width) each.

    Of more than `most` images, some spread over all are read; each takes 4 bytes a value.

    Raises:
        InputError: there is no such folder, it has fewer than `least` images, or one cannot be read.
        ConfigError: as `preprocessing_of` does.
        MissingExtraError: Pillow is not installed.
    """
    how = preprocessing_of(source)
    files = find_images(folder)
    if len(files) < least:
        raise InputError(
            f"{folder} has {len(files)} images ({' '.join(SUFFIXES)}); at least {least} are needed. Add images."
        )
    chosen = [files[place * len(files) // most] for place in range(most)] if len(files) > most else files
    found = []
    for number, path in enumerate(chosen):
        progress("reading images", number / len(chosen))
        found.append(_checked(preprocess(load_image(path), how), source, path))
    return found


def _checked(image: Tensor, source: Source, path: Path) -> Tensor:
    wanted = _patches(source).image_size
    if tuple(image.shape[1:]) != wanted:
        raise InputError(
            f"{path}: {tuple(image.shape[1:])} pixels where the encoder reads {wanted} (height, width), and "
            f"{PREPROCESSOR_FILE} says do_resize=false. Resize the images, or say true there."
        )
    return image
