"""Images: which files of a folder are some, and one as bytes (3, height, width), an array or a tensor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from trilevel.errors import InputError, require

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
BILINEAR = 2
"""Pillow's number of the filter."""
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
# of red, green and blue in grey, ITU-R BT.601, as Pillow has it
_LUMA = np.array([299, 587, 114])[:, None, None]


def find_images(folder: str | Path) -> list[Path]:
    """The images in a folder and the folders inside it, by their suffix, sorted; hidden ones are passed over.

    Raises:
        InputError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {state}; a folder of images is needed. Check the path.")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    # copies from a Mac bring ._picture.jpg, which is none
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def load_image(path: str | Path) -> Tensor:
    """`read_image` as a tensor."""
    import torch

    return torch.from_numpy(read_image(path))


def read_image(path: str | Path | BinaryIO, *, name: str | None = None) -> Pixels:
    """One image as red, green and blue: uint8 (3, height, width), turned as its EXIF says, the first of an animation.

    What is transparent lies on white, as in transformers' `convert_to_rgb`.

    Args:
        path: of a file, or one that is open.
        name: of it in messages; None for the path.

    Raises:
        InputError: the file is missing, damaged, of another kind, has more than 8 bits a channel, or more pixels than
            Pillow's `MAX_IMAGE_PIXELS`, and so may be there to fill the memory.
        MissingExtraError: Pillow is not installed (extra `convert`).
    """
    pil, operations = require("PIL.Image", extra="convert"), require("PIL.ImageOps", extra="convert")
    said = str(path) if name is None else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with pil.open(path, formats=_FORMATS) as image:
                rgb = _rgb(operations.exif_transpose(image), said)
    except InputError:
        raise
    except (pil.DecompressionBombWarning, pil.DecompressionBombError) as error:
        raise InputError(
            f"{said}: over {pil.MAX_IMAGE_PIXELS:,} pixels; such an image is not read. Make it smaller or take it away."
        ) from error
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise InputError(
            f"{said}: not a readable image ({error}). {', '.join(_FORMATS)} are read; save it again or take it away."
        ) from error
    return _channels_first(rgb)


def _rgb(image: Any, path: str) -> Any:
    if image.mode == "F" or image.mode.startswith("I"):
        raise InputError(
            f"{path}: an image of more than 8 bits a channel (Pillow's mode {image.mode}), which would be cut off at "
            "255. Save it with 8 bits a channel."
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        pil = require("PIL.Image", extra="convert")
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def resize(image: Tensor, size: tuple[int, int], *, resample: int = BILINEAR) -> Tensor:
    """`resized` of a tensor."""
    import torch

    return torch.from_numpy(resized(image.numpy(), size, resample=resample))


def resized(image: Pixels, size: tuple[int, int], *, resample: int = BILINEAR) -> Pixels:
    """An image, uint8 (3, height, width), at another height and width, by Pillow's filter of that number."""
    pil = require("PIL.Image", extra="convert")
    height, width = size
    return _channels_first(pil.fromarray(image.transpose(1, 2, 0)).resize((width, height), resample=resample))


def with_channels(pixels: Pixels, num_channels: int) -> Pixels:
    """Bytes (images, channels, height, width) with one channel, grey, or three.

    >>> with_channels(np.array([255, 0, 0], np.uint8).reshape(1, 3, 1, 1), 1).flatten().tolist()
    [76]
    """
    if pixels.shape[1] == num_channels:
        return pixels
    if num_channels == 3:
        return np.repeat(pixels, 3, axis=1)
    grey: Pixels = (((pixels * _LUMA).sum(1, keepdims=True) + 500) // 1_000).astype(np.uint8)
    return grey


def _channels_first(rgb: Any) -> Pixels:
    return np.ascontiguousarray(np.array(rgb).transpose(2, 0, 1))
