"""Images: which files are found, what a file becomes, and every bad one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trilevel.data.images import find_images, load_image, resize
from trilevel.errors import InputError

pil = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra 'convert'")
HEIGHT, WIDTH = 5, 7


def noise(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


# definition


@pytest.mark.parametrize("name", ["a.png", "a.BMP", "a.webp"])
def test_every_pixel_is_kept(tmp_path: Path, name: str) -> None:
    pixels = noise(HEIGHT, WIDTH, 3)
    pil.fromarray(pixels).save(tmp_path / name, lossless=True)
    found = load_image(tmp_path / name)
    assert (found.shape, found.dtype) == ((3, HEIGHT, WIDTH), torch.uint8)
    assert np.array_equal(found.numpy(), pixels.transpose(2, 0, 1))


def test_jpeg_is_what_pillow_decodes(tmp_path: Path) -> None:
    pil.fromarray(noise(HEIGHT, WIDTH, 3)).save(tmp_path / "a.jpeg")
    with pil.open(tmp_path / "a.jpeg") as image:
        assert np.array_equal(load_image(tmp_path / "a.jpeg").permute(1, 2, 0).numpy(), np.array(image))


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = noise(HEIGHT, WIDTH)
    pil.fromarray(grey).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")
    assert all(np.array_equal(channel.numpy(), grey) for channel in found)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    colours = noise(HEIGHT, WIDTH, 4)
    colours[..., 3] = 255
    colours[2, 3, 3] = 0
    pil.fromarray(colours).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png")
    assert found[:, 2, 3].tolist() == [255, 255, 255]
    assert found[:, 1, 4].tolist() == colours[1, 4, :3].tolist()
    palette = pil.new("P", (WIDTH, HEIGHT), 1)
    palette.putpalette([9, 8, 7, 6, 5, 4])
    palette.save(tmp_path / "b.png", transparency=1)
    assert set(load_image(tmp_path / "b.png").flatten().tolist()) == {255}


def test_an_image_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    pixels = noise(HEIGHT, WIDTH, 3)
    image = pil.fromarray(pixels)
    exif = pil.Exif()
    # orientation 6: a quarter to the left
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), np.rot90(pixels, -1))


def test_resizing_is_pillows(tmp_path: Path) -> None:
    pixels = noise(HEIGHT, WIDTH, 3)
    for resample in range(6):
        wanted = pil.fromarray(pixels).resize((13, 11), resample=resample)
        found = resize(torch.from_numpy(pixels).permute(2, 0, 1), (11, 13), resample=resample)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(wanted))


def test_images_are_found_in_every_folder(tmp_path: Path) -> None:
    names = ["b/c.JPG", "a.png", "b/d/e.webp", "z.jpeg", "f.bmp"]
    for name in [*names, "g.txt", "._a.png", ".hidden/h.png", "b/i.gif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)


# messages


def test_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none does not exist; a folder of images is needed"):
        find_images(tmp_path / "none")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png is a file; a folder"):
        find_images(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pil.fromarray(noise(61, 67, 3)).save(path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"no image at all"):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}: not a readable image .*save it again or take it away"):
            load_image(path)


def test_other_kinds_and_places_are_refused(tmp_path: Path) -> None:
    pil.fromarray(noise(HEIGHT, WIDTH, 3)).save(tmp_path / "a.gif")
    for path in (tmp_path / "a.gif", tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match=f"{path}: not a readable image"):
            load_image(path)


@pytest.mark.parametrize("times", [1.5, 3.0])
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    path = tmp_path / "a.png"
    pil.fromarray(noise(HEIGHT, WIDTH, 3)).save(path)
    # Pillow warns above its limit and raises above twice that
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", int(HEIGHT * WIDTH / times))
    with pytest.raises(InputError, match=r"a\.png: over \d+ pixels; .*Make it smaller or take it away"):
        load_image(path)


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    pil.fromarray(np.full((HEIGHT, WIDTH), 3_000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: an image of more than 8 bits a channel"):
        load_image(tmp_path / "a.png")
