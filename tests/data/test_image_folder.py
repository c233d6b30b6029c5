"""Labelled images: layouts, splits, the cache, and every way in which a data set is bad."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trilevel.data import image_cache
from trilevel.data.image_folder import ImageSet, check_images, check_labels, load_images
from trilevel.errors import ConfigError, InputError

pil = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra 'images'")
HEIGHT, WIDTH = 5, 7
Array = np.ndarray[Any, np.dtype[np.uint8]]


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, pixels: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(pixels).save(path)
    return path


def write_folder(folder: Path, count: int = 12, classes: tuple[str, ...] = ("dog", "cat"), seed: int = 0) -> None:
    for place, name in enumerate(classes):
        for number in range(count):
            write(folder / name / f"{number}.png", noise(seed + 1_000 * place + number, HEIGHT, WIDTH, 3))


def save(path: Path, **values: Any) -> None:
    np.savez(path, **values)


def load(path: Path, **options: Any) -> ImageSet:
    return load_images(path, cache=path.parent / "cache", **({"valid_fraction": 0.3} | options))


# definition


def test_class_folders(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    (tmp_path / "set" / "README.txt").write_text("not an image")
    (tmp_path / "set" / ".hidden").mkdir()
    told: list[tuple[str, int, int]] = []
    images = load(tmp_path / "set", on_progress=lambda *facts: told.append(facts))
    assert (images.labels, images.image_size, images.num_channels) == (("cat", "dog"), (HEIGHT, WIDTH), 3)
    held, kept = images.counts("valid"), images.counts("train")
    assert {name: held[name] + kept[name] for name in held} == {"cat": 12, "dog": 12}
    assert images.counts("test") == {"cat": 0, "dog": 0}
    assert 0 < len(images.rows["valid"]) < len(images.rows["train"])
    assert told[-1] == ("decoding", 24, 24)
    assert ("reading", 24, 24) in told
    # the first file by name is the first cat
    assert images.classes[0] == 0
    assert np.array_equal(images.pixels[0].transpose(1, 2, 0), noise(1_000, HEIGHT, WIDTH, 3))


def test_split_folders(tmp_path: Path) -> None:
    for seed, (split, count) in enumerate({"train": 9, "Val": 3, "test": 4}.items()):
        write_folder(tmp_path / "set" / split, count, seed=100 * seed)
    shared = write(tmp_path / "set" / "test" / "cat" / "shared.png", noise(0, HEIGHT, WIDTH, 3))
    images = load(tmp_path / "set")
    assert {split: len(rows) for split, rows in images.rows.items()} == {"train": 18, "valid": 6, "test": 9}
    # it is the first dog of train
    assert images.num_shared == 1
    shared.unlink()
    assert load(tmp_path / "set").num_shared == 0


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_folder(tmp_path / "set", classes=("train", "car"))
    assert load(tmp_path / "set").labels == ("car", "train")


def test_without_valid_the_content_decides(tmp_path: Path) -> None:
    write_folder(tmp_path / "one" / "train")
    write_folder(tmp_path / "one" / "test", 2, seed=50)
    write_folder(tmp_path / "two")
    for number, file in enumerate(sorted((tmp_path / "two" / "cat").iterdir())):
        # neither name nor order counts
        file.rename(file.with_name(f"{(7 * number) % 12}-renamed.png"))
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert len(one.rows["test"]) == 4
    for split in ("train", "valid"):
        assert np.array_equal(one.pixels[one.rows[split]], two.pixels[two.rows[split]])
    few = load(tmp_path / "two", limit=3)
    assert few.rows["train"].tolist() == two.rows["train"][:3].tolist()


def test_equal_files_are_on_one_side(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    for number in range(40):
        write(tmp_path / "set" / "cat" / f"same-{number}.png", noise(99, HEIGHT, WIDTH, 3))
    images = load(tmp_path / "set")
    same = noise(99, HEIGHT, WIDTH, 3)[..., 0]
    sides = [split for split in images.rows for row in images.rows[split] if (images.pixels[row, 0] == same).all()]
    assert (len(sides), len(set(sides)), images.num_shared) == (40, 1, 0)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "set" / "a" / f"{number}.png", noise(number, HEIGHT, WIDTH))
    images = load(tmp_path / "set")
    assert images.num_channels == 1
    assert np.array_equal(images.pixels[2, 0], noise(2, HEIGHT, WIDTH))
    write(tmp_path / "set" / "b" / "colour.png", noise(7, HEIGHT, WIDTH, 3))
    assert load(tmp_path / "set").num_channels == 3


def test_sizes_may_differ_if_one_is_given(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a" / "0.png", noise(0, HEIGHT, WIDTH, 3))
    write(tmp_path / "set" / "b" / "1.png", noise(1, 11, 13, 3))
    assert load(tmp_path / "set", size=(6, 4)).pixels.shape == (2, 3, 6, 4)
    with pytest.raises(InputError, match=r"1\.png is of 11 x 13 pixels and .*0\.png of 5 x 7; .*give --size \(such as"):
        load(tmp_path / "set")


# archives


def jpeg(pixels: Array) -> bytes:
    stream = io.BytesIO()
    pil.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def test_archive_of_arrays(tmp_path: Path) -> None:
    train, test = noise(1, 30, HEIGHT, WIDTH), noise(2, 4, HEIGHT, WIDTH)
    values = {"x_train": train, "y_train": np.arange(30) % 3, "x_test": test, "y_test": np.arange(4) % 3}
    save(tmp_path / "set.npz", **values)
    images = load(tmp_path / "set.npz")
    assert (images.labels, images.num_channels, len(images.rows["test"])) == (("0", "1", "2"), 1, 4)
    assert len(images.rows["train"]) + len(images.rows["valid"]) == 30
    assert np.array_equal(images.pixels[:30, 0], train)
    assert np.array_equal(images.pixels[30:, 0], test)
    assert images.classes.tolist() == [*np.arange(30) % 3, *np.arange(4) % 3]


def test_archive_of_files(tmp_path: Path) -> None:
    files = [jpeg(noise(n, HEIGHT, WIDTH, 3)) for n in range(6)]
    ends = np.cumsum([0, *map(len, files)])
    values = {"data_train": np.frombuffer(b"".join(files), np.uint8), "off_train": ends, "y_train": np.arange(6) % 2}
    values |= {"data_val": values["data_train"], "off_val": ends, "y_val": values["y_train"]}
    save(tmp_path / "set.npz", names=np.array(["no", "yes"]), **values)
    images = load(tmp_path / "set.npz")
    assert (images.labels, images.num_shared) == (("no", "yes"), 6)
    assert {split: len(rows) for split, rows in images.rows.items()} == {"train": 6, "valid": 6, "test": 0}
    with pil.open(io.BytesIO(files[3])) as image:
        assert np.array_equal(images.pixels[3].transpose(1, 2, 0), np.array(image))


def test_fashion_mnist(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "images" / "fashion_mnist.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    images = load_images(path, valid_fraction=0.1, cache=tmp_path)
    assert (images.pixels.shape, images.num_shared) == ((70_000, 1, 28, 28), 0)
    assert images.counts("test") == dict.fromkeys(images.labels, 1_000)
    assert images.labels[9] == "Ankle boot"
    assert 5_500 < len(images.rows["valid"]) < 6_500


# the cache


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set")
    first = load(tmp_path / "set")
    pixels = np.array(load(tmp_path / "set").pixels)
    file = next((tmp_path / "cache").iterdir())
    # a file that was cut off is made again
    file.write_bytes(file.read_bytes()[:200])
    assert np.array_equal(load(tmp_path / "set").pixels, pixels)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]
    monkeypatch.setattr(image_cache, "_write", lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(load(tmp_path / "set").pixels, pixels)
    assert not first.pixels.flags.writeable


def test_the_default_cache_and_one_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "set")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    load_images(tmp_path / "set", valid_fraction=0.3)
    assert len(list((tmp_path / "home" / "trilevel" / "images").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be kept there .* set XDG_CACHE_HOME"):
        load_images(tmp_path / "set", valid_fraction=0.3, cache=tmp_path / "file" / "below")


# messages


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    (tmp_path / "set" / "cat" / "5.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cat/5\.png: not a readable image"):
        load(tmp_path / "set")
    assert not list((tmp_path / "cache").iterdir())
    bad = {"data_train": np.zeros(8, np.uint8), "off_train": np.array([0, 8]), "y_train": np.array([0])}
    save(tmp_path / "set.npz", **bad)
    with pytest.raises(InputError, match=r"set\.npz, image 0: not a readable image"):
        load(tmp_path / "set.npz")


def test_unknown_layouts(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    with pytest.raises(InputError, match=r"holds no folders; unknown layout\. Needed is DIR/CLASS"):
        load(folder)
    write(folder / "a.png", noise(0, HEIGHT, WIDTH))
    with pytest.raises(InputError, match=r"a\.png lies in no folder of a class.*move the images into folders"):
        load(folder)
    (folder / "a.png").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no image; \.png, "):
        load(folder)
    (folder / "empty").rmdir()
    write_folder(folder / "test")
    with pytest.raises(InputError, match="has no train; unknown layout"):
        load(folder)
    write_folder(folder / "more")
    with pytest.raises(InputError, match="has more beside test; unknown layout"):
        load(folder)
    with pytest.raises(InputError, match="none does not exist"):
        load(tmp_path / "none")
    with pytest.raises(InputError, match=r"neither a folder nor an \.npz archive"):
        load(write(tmp_path / "one.png", noise(0, HEIGHT, WIDTH)))


X = noise(0, 2, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"a": X}, "has the arrays 'a'; y_train is needed"),
        ({"y_train": np.arange(2)}, "x_train as uint8"),
        ({"y_train": np.arange(2), "x_train": X.astype(np.float32)}, "x_train as uint8"),
        ({"y_train": np.arange(3), "x_train": X}, "2 images and 3 classes"),
        ({"y_train": np.arange(2), "x_train": X, "names": np.array(["a"])}, "2 classes and the names"),
        ({"y_train": np.array([{}, {}], object), "x_train": X}, r"neither a folder nor an \.npz archive"),
    ],
)
def test_bad_archives(tmp_path: Path, values: dict[str, Any], match: str) -> None:
    save(tmp_path / "set.npz", **values)
    with pytest.raises(InputError, match=match):
        load(tmp_path / "set.npz")


def test_sets_that_teach_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", classes=("cat",))
    with pytest.raises(InputError, match="all images are of the class 'cat'; at least two classes"):
        check_images(load(tmp_path / "one"))
    write_folder(tmp_path / "few", 3)
    with pytest.raises(InputError, match="2 of 2 classes have fewer than 8 training images: 'cat' has"):
        check_images(load(tmp_path / "few"))
    write_folder(tmp_path / "set")
    with pytest.raises(InputError, match="24 images are too few to hold any out"):
        check_images(load(tmp_path / "set", valid_fraction=1e-9))
    images = load(tmp_path / "set")
    check_images(load(tmp_path / "set", valid_fraction=0.1))
    check_labels(images, ("dog", "cat", "cow"))
    with pytest.raises(InputError, match="unknown classes 'dog'; the model knows 'cat'"):
        check_labels(images, ("cat",))


@pytest.mark.parametrize("bad", [{"valid_fraction": 1.0}, {"limit": 0}, {"size": (0, 3)}])
def test_values_out_of_range(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        load(tmp_path, **bad)
