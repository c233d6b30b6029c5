"""Where labelled images come from: class folders, or an archive; what each image is, and how it is read."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trilevel.data.images import SUFFIXES, find_images, load_image
from trilevel.errors import InputError, require

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {name: name for name in SPLITS} | {"validation": "valid", "val": "valid", "dev": "valid"}
_LAYOUTS = "DIR/CLASS/*.png, or DIR/train/CLASS/*.png with DIR/valid and DIR/test beside it"
# what an archive without names of its own holds
_NAMES = {
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """Images that are not decoded yet; lists and arrays have an entry for each.

    Attributes:
        path: folder or archive.
        labels: names of the classes.
        splits: `train`, `valid` or `test`.
        classes: places in `labels`.
        marks: uint64, the start of a hash of the content.
        sha256: of all contents and classes.
        where: names image i, for messages.
        read: image i, uint8 (height, width, 3) or, grey, (height, width).
    """

    path: Path
    labels: tuple[str, ...]
    splits: Sequence[str]
    classes: Sequence[int]
    marks: np.ndarray
    sha256: str
    where: Callable[[int], str]
    read: Callable[[int], np.ndarray]


def open_folder(path: Path, on_progress: Progress = lambda _what, _done, _total: None) -> ImageSource:
    """The images below a folder, by class and, if it says so, by split.

    Raises:
        InputError: the layout is unknown, or a folder holds no image.
    """
    found: list[tuple[str, str, Path]] = []
    for split, folder in _split_folders(path):
        for class_folder in _folders(folder):
            files = find_images(class_folder)
            if not files and split == "train":
                raise InputError(
                    f"{class_folder} holds no image; {', '.join(SUFFIXES)} are read. Add some, or take it away."
                )
            found += [(split, class_folder.name, file) for file in files]
    labels = tuple(sorted({label for _, label, _ in found}))
    places = {label: place for place, label in enumerate(labels)}
    files = [file for *_, file in found]
    return ImageSource(
        path=path,
        labels=labels,
        splits=[split for split, *_ in found],
        classes=[places[label] for _, label, _ in found],
        where=lambda i: str(files[i]),
        read=lambda i: load_image(files[i]).permute(1, 2, 0).numpy(),
        **_hashes([label for _, label, _ in found], lambda i: _bytes(files[i]), on_progress),
    )


def _split_folders(path: Path) -> list[tuple[str, Path]]:
    """Folders of classes, each with its split."""
    folders = _folders(path)
    by_split = [folder for folder in folders if folder.name.lower() in _SPLIT_NAMES and _folders(folder)]
    if not by_split:
        _check_layout(path, folders)
        return [("train", path)]
    named = [(_SPLIT_NAMES[folder.name.lower()], folder) for folder in by_split]
    others = [folder.name for folder in folders if folder not in by_split]
    if others or "train" not in dict(named):
        has = f"has {', '.join(others)} beside {by_split[0].name}" if others else "has no train"
        raise InputError(f"{path} {has}; unknown layout. Needed is {_LAYOUTS}.")
    for _, folder in named:
        _check_layout(folder, _folders(folder))
    return named


def _check_layout(path: Path, folders: list[Path]) -> None:
    stray = [file for file in path.iterdir() if file.is_file() and file.suffix.lower() in SUFFIXES]
    if stray:
        raise InputError(
            f"{min(stray)} lies in no folder of a class; unknown layout. Needed is {_LAYOUTS}: move the images into "
            "folders named as their classes."
        )
    if not folders:
        raise InputError(f"{path} holds no folders; unknown layout. Needed is {_LAYOUTS}.")


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def open_archive(path: Path, on_progress: Progress = lambda _what, _done, _total: None) -> ImageSource:
    """The images of an `.npz` archive.

    For S in train, valid (or val) and test it holds `x_S` (images, height, width[, 3]) uint8, or the bytes of image
    files, `data_S[off_S[i]:off_S[i + 1]]`; and `y_S`, the classes, whose names are in `names` or `words`, if anywhere.

    Raises:
        InputError: there is no such file, or it is no such archive.
    """
    arrays = _arrays(path)
    parts = [(split, name) for name, split in _SPLIT_NAMES.items() if f"y_{name}" in arrays]
    if "train" not in dict(parts):
        raise InputError(
            f"{path} has the arrays {', '.join(map(repr, sorted(arrays))) or 'none'}; y_train is needed, with x_train, "
            "or data_train and off_train."
        )
    images: list[Any] = []
    splits: list[str] = []
    for split, name in parts:
        images += _images_of(arrays, name, path)
        splits += [split] * (len(images) - len(splits))
    classes = np.concatenate([arrays[f"y_{name}"] for _, name in parts]).astype(int).tolist()
    if len(classes) != len(images) or min(classes) < 0:
        raise InputError(f"{path}: {len(images)} images and {len(classes)} classes; one class >= 0 an image is needed.")
    labels = _labels(arrays, path, max(classes) + 1)
    return ImageSource(
        path=path,
        labels=labels,
        splits=splits,
        classes=classes,
        where=lambda i: f"{path}, image {i}",
        read=lambda i: images[i] if isinstance(images[i], np.ndarray) else _decoded(images[i], f"{path}, image {i}"),
        **_hashes([labels[place] for place in classes], lambda i: bytes(images[i]), on_progress),
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"{path} does not exist; a folder of images or an .npz archive is needed. Check the path.")
    try:
        # no pickles: numpy refuses them
        with np.load(path) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: neither a folder nor an .npz archive of arrays ({error}).") from error


def _images_of(arrays: dict[str, np.ndarray], name: str, path: Path) -> list[Any]:
    """Arrays of pixels, or the bytes of files."""
    pixels, data, ends = (arrays.get(f"{kind}_{name}") for kind in ("x", "data", "off"))
    if pixels is not None and pixels.dtype == np.uint8 and (pixels.ndim == 3 or pixels.shape[3:] in ((1,), (3,))):
        return list(pixels[..., 0] if pixels.shape[3:] == (1,) else pixels)
    if data is not None and ends is not None and data.dtype == np.uint8:
        whole, places = data.tobytes(), ends.tolist()
        return [whole[start:end] for start, end in pairwise(places)]
    raise InputError(
        f"{path}: x_{name} as uint8 (images, height, width) or (images, height, width, 3), or data_{name} and "
        f"off_{name} are needed."
    )


def _labels(arrays: dict[str, np.ndarray], path: Path, num_classes: int) -> tuple[str, ...]:
    given = arrays.get("names", arrays.get("words"))
    names = tuple(map(str, given.tolist())) if given is not None else _NAMES.get(path.stem, ())
    if given is None and len(names) != num_classes:
        names = tuple(map(str, range(num_classes)))
    if len(names) < num_classes or len(set(names)) != len(names):
        raise InputError(f"{path}: {num_classes} classes and the names {names}; a different name for each is needed.")
    return names


def _decoded(data: bytes, where: str) -> np.ndarray:
    pil = require("PIL.Image", extra="images")
    try:
        with pil.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise InputError(f"{where}: not a readable image ({error}). Make the archive again.") from error


def _hashes(labels: Sequence[str], content: Callable[[int], bytes], on_progress: Progress) -> dict[str, Any]:
    """`marks` and `sha256` of an `ImageSource`."""
    marks = np.empty(len(labels), dtype=np.uint64)
    total = hashlib.sha256()
    for place, label in enumerate(labels):
        digest = hashlib.sha256(content(place)).digest()
        marks[place] = int.from_bytes(digest[:8], "big")
        total.update(digest + label.encode("utf-8", "surrogateescape") + b"\0")
        on_progress("reading", place + 1, len(labels))
    return {"marks": marks, "sha256": total.hexdigest()}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
