"""Decoded images on disk: each data set is decoded once, into one array that is mapped into memory."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from trilevel.data.image_sources import ImageSource, Progress
from trilevel.data.images import resize
from trilevel.errors import InputError

_VERSION = 1
_COPIED_AT_ONCE = 1_024


def cached_pixels(
    source: ImageSource,
    *,
    size: tuple[int, int] | None,
    folder: Path | None = None,
    on_progress: Progress = lambda _what, _done, _total: None,
) -> np.ndarray:
    """The images as uint8 (images, channels, height, width), mapped from `folder`, where they are decoded to first.

    One channel if all are grey, else three. The name of the file is a hash of contents, classes and size.

    Raises:
        InputError: an image is damaged, sizes differ and none is given, or the folder cannot be written.
    """
    folder = cache_folder() if folder is None else folder
    key = hashlib.sha256(f"{_VERSION} {source.sha256} {size}".encode()).hexdigest()
    path = folder / f"{key[:32]}.npy"
    found = _mapped(path, len(source.classes))
    if found is None:
        try:
            _write(path, source, size, on_progress)
        except OSError as error:
            raise InputError(
                f"{folder}: decoded images cannot be kept there ({error}). Free space, or set XDG_CACHE_HOME to "
                "another folder."
            ) from error
        found = _mapped(path, len(source.classes))
        assert found is not None
    return found


def cache_folder() -> Path:
    """`XDG_CACHE_HOME`, else `~/.cache`, and in it `trilevel/images`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trilevel" / "images"


def _mapped(path: Path, num_images: int) -> np.ndarray | None:
    """The array, or None if it is not there, not whole or not one of these."""
    try:
        found: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == np.uint8 and found.ndim == 4 and len(found) == num_images else None


def _write(path: Path, source: ImageSource, size: tuple[int, int] | None, on_progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # beside its place, so that it takes it whole or not at all
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        colour, grey = Path(temporary) / "colour.npy", Path(temporary) / "grey.npy"
        if _decode(colour, source, size, on_progress):
            _copy_channel(colour, grey)
            grey.replace(path)
        else:
            colour.replace(path)


def _decode(path: Path, source: ImageSource, size: tuple[int, int] | None, on_progress: Progress) -> bool:
    """Write all images with three channels; whether all of them are grey."""
    total = len(source.classes)
    height, width = size or source.read(0).shape[:2]
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(total, 3, height, width))
    are_grey = True
    for place in range(total):
        image = source.read(place)
        pixels = np.broadcast_to(image[..., None], (*image.shape[:2], 3)) if image.ndim == 2 else image
        if size is not None:
            pixels = resize(torch.tensor(pixels).permute(2, 0, 1), size).permute(1, 2, 0).numpy()
        elif pixels.shape[:2] != (height, width):
            raise InputError(
                f"{source.where(place)} is of {pixels.shape[0]} x {pixels.shape[1]} pixels and {source.where(0)} of "
                f"{height} x {width}; all must be alike. Resize them, or give --size "
                f"(such as --size {min(height, width)})."
            )
        are_grey = are_grey and bool((pixels == pixels[..., :1]).all())
        array[place] = pixels.transpose(2, 0, 1)
        on_progress("decoding", place + 1, total)
    array.flush()
    return are_grey


def _copy_channel(source: Path, target: Path) -> None:
    colour = np.load(source, mmap_mode="r")
    shape = (len(colour), 1, *colour.shape[2:])
    grey = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    for start in range(0, len(colour), _COPIED_AT_ONCE):
        grey[start : start + _COPIED_AT_ONCE] = colour[start : start + _COPIED_AT_ONCE, :1]
    grey.flush()
