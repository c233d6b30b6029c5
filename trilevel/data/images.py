"""Images: which files of a folder are some, and one as a tensor of bytes (3, height, width)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trilevel.errors import InputError, require

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
BILINEAR = 2
"""Pillow's number of the filter."""
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")


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
    """One image as red, green and blue: uint8 (3, height, width), turned as its EXIF says, the first of an animation.

    What is transparent lies on white, as in transformers' `convert_to_rgb`.

    Raises:
        InputError: the file is missing, damaged, of another kind, has more than 8 bits a channel, or more pixels than
            Pillow's `MAX_IMAGE_PIXELS`, and so may be there to fill the memory.
        MissingExtraError: Pillow is not installed (extra `convert`).
    """
    pil, operations = require("PIL.Image", extra="convert"), require("PIL.ImageOps", extra="convert")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with pil.open(path, formats=_FORMATS) as image:
                rgb = _rgb(operations.exif_transpose(image), path)
    except InputError:
        raise
    except (pil.DecompressionBombWarning, pil.DecompressionBombError) as error:
        raise InputError(
            f"{path}: over {pil.MAX_IMAGE_PIXELS:,} pixels; such an image is not read. Make it smaller or take it away."
        ) from error
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise InputError(
            f"{path}: not a readable image ({error}). {', '.join(_FORMATS)} are read; save it again or take it away."
        ) from error
    return _tensor(rgb)


def _rgb(image: Any, path: str | Path) -> Any:
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
    """An image, uint8 (3, height, width), at another height and width, by Pillow's filter of that number."""
    pil = require("PIL.Image", extra="convert")
    height, width = size
    return _tensor(pil.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), resample=resample))


def _tensor(rgb: Any) -> Tensor:
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
