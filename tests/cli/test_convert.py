"""`trilevel convert`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.conversion.pretrained import make, save
from trilevel.cli.main import app
from trilevel.conversion.load import load_encoder

pytest.importorskip("scipy", reason="scipy comes with the extra 'convert'")
pil = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra 'convert'")
TEXT = "\n\n".join(" ".join(f"w{(7 * line + word) % 56}" for word in range(30)) + "." for line in range(400))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(make("bert"), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = save(make("vit", num_channels=3), tmp_path_factory.mktemp("vit"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": [10, 21], "image_std": [0.3, 0.4, 0.5]}))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many as are needed at least, in folders of folders."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(7)
    for number in range(40):
        path = folder / str(number % 3) / f"{number}{('.png', '.JPG', '.webp', '.bmp', '.jpeg')[number % 5]}"
        path.parent.mkdir(exist_ok=True)
        pil.fromarray(generator.integers(0, 256, (3, 2, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result


def test_a_folder_is_converted_and_said_what_it_is(bert: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    result = call(bert, out, "--text", text, "--steps", 2, "--window", 5, "--ratio", "1:1:1", "--dense-heads", 3)
    assert result.exit_code == 0, result.output
    assert "heads: 2 local, 2 regional, 2 global, 3 dense" in result.stdout
    assert "cosine to the original, 32 held-out pieces" in result.stdout
    assert "2,048 tokens: dense" in result.stdout
    assert json.loads((out / "report.json").read_text())["settings"]["num_dense_heads"] == 3


def test_rows_kept_for_tests_are_not_looked_at(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(number), "title": "", "text": TEXT if split == "train" else "w1 " * 9_000, "split": split}
        for number, split in enumerate(("train", "test"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    from trilevel.cli.convert import _texts

    assert [len(found) for found in _texts([path])] == [len(TEXT)]


def test_the_built_in_text_is_the_default() -> None:
    from trilevel.cli.convert import _texts

    (found,) = _texts(None)
    assert len(found.split()) >= 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "6:3"], "--ratio 6:3 must be three shares"),
        (["--ratio", "a:b:c"], "must be three shares"),
        (["--ratio", "auto"], "--ratio auto and --max-error go together"),
        (["--max-error", "0.1"], "--ratio auto and --max-error go together"),
        (["--window", "6"], "window=6 must be odd"),
        (["--trained", "some"], "trained='some' is unknown"),
        (["--sha256", "00"], "is asked for"),
    ],
)
def test_wrong_arguments_leave_with_2(
    bert: Path, text: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = call(bert, tmp_path / "out", "--text", text, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_text_that_is_too_short_leaves_with_2(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10.")
    result = call(bert, tmp_path / "out", "--text", path)
    assert result.exit_code == 2
    assert "too few" in result.output
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert call(bert, tmp_path / "out", "--text", empty).exit_code == 2


def test_an_unknown_source_leaves_with_2(tmp_path: Path, text: Path) -> None:
    save(make("bert"), tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    result = call(tmp_path / "pickled", tmp_path / "out", "--text", text)
    assert result.exit_code == 2
    assert "pytorch_model.bin" in result.output


def test_a_loss_above_the_bound_leaves_with_2_and_writes_nothing(bert: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(bert, out, "--text", text, "--steps", 0, "--window", 5, "--max-loss", "0")
    assert result.exit_code == 2
    assert "nothing is written" in result.output
    assert not out.exists()


# images


def test_a_vit_is_converted_on_a_folder_of_images(vit: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    result = call(vit, out, "--images", images, "--steps", 2, "--window", 5, "--ratio", "1:1:1")
    assert result.exit_code == 0, result.output
    assert "heads: 3 local, 3 regional, 3 global" in result.stdout
    assert "cosine to the original, 32 held-out images" in result.stdout
    assert "15 tokens: dense" in result.stdout
    assert "encoder, preprocessor, report.json" in result.stdout
    assert "ViT's defaults" not in result.output
    report = json.loads((out / "report.json").read_text())
    assert report["quality"]["after"]["num_sequences"] == 32
    assert report["profiled"] == {"sequences": 8, "tokens": 8 * 15}
    made, original = load_encoder(out), load_encoder(vit)
    assert made.preprocessor == json.loads((vit / "preprocessor_config.json").read_text())
    assert made.encoder.config.levels is not None
    pixels = torch.randn(2, 3, 10, 21)
    with torch.no_grad():
        cosine = torch.cosine_similarity(made.encoder(pixels)[:, 0], original.encoder(pixels)[:, 0])
    assert cosine.min() > 0.9


def test_images_that_see_everything_are_the_originals(vit: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    result = call(vit, out, "--images", images, "--steps", 0, "--dense-heads", 9)
    assert result.exit_code == 0, result.output
    pixels = torch.randn(2, 3, 10, 21)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(out).encoder(pixels), load_encoder(vit).encoder(pixels))


def test_a_deit_without_a_preprocessor_says_what_is_done(images: Path, tmp_path: Path) -> None:
    deit = save(make("deit", num_channels=3), tmp_path / "deit")
    result = call(deit, tmp_path / "out", "--images", images, "--steps", 1, "--window", 5)
    assert result.exit_code == 0, result.output
    assert "has no preprocessor_config.json; images are resized to its image_size" in result.stdout
    assert "ViT's defaults (bilinear, mean and std 0.5)" in result.stdout
    assert "encoder, report.json" in result.stdout
    assert load_encoder(tmp_path / "out").preprocessor is None


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("bert", ["--images"], "(bert) reads text, not images: give --text FILE, no --images"),
        ("bert", ["--images", "--text"], "(bert) reads text, not images"),
        ("vit", ["--text"], "(vit) reads images, not text: give --images FOLDER, no --text"),
        ("vit", ["--images", "--text"], "(vit) reads images, not text"),
        ("vit", [], "(vit) reads images: --images FOLDER with some is needed"),
    ],
)
def test_text_and_images_are_not_mixed_up(
    request: pytest.FixtureRequest,
    text: Path,
    images: Path,
    tmp_path: Path,
    source: str,
    options: list[str],
    message: str,
) -> None:
    given = [part for option in options for part in (option, images if option == "--images" else text)]
    result = call(request.getfixturevalue(source), tmp_path / "out", *given)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_used_leave_with_2(vit: Path, images: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        result = call(vit, tmp_path / "out", "--images", folder)
        assert result.exit_code == 2
        assert not (tmp_path / "out").exists()
        return result.output

    assert "nowhere does not exist; a folder of images is needed" in refused(tmp_path / "nowhere")
    assert "0 has 14 images (.png .jpg .jpeg .bmp .webp); at least 40 are needed" in refused(images / "0")
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    (copy / "1" / "1.JPG").write_bytes((copy / "1" / "1.JPG").read_bytes()[:99])
    assert "1.JPG: not a readable image" in refused(copy)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "preprocessor_config.json cannot be read as JSON"),
        ("[]", "preprocessor_config.json holds list, not an object"),
        ('{"size": {"shortest_edge": 10}}', "an integer or two is supported"),
        ('{"size": 224}', "makes images of (224, 224) and config.json says image_size=(10, 21)"),
    ],
)
def test_a_preprocessor_that_cannot_be_used_leaves_with_2(
    vit: Path, images: Path, tmp_path: Path, written: str, message: str
) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(written)
    result = call(tmp_path / "vit", tmp_path / "out", "--images", images)
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()
