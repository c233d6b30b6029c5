"""What conversion changed, kept apart from the pretrained weights, and put back on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conversion.pretrained import DIM, HEADS, LAYERS, inputs, make, save
from trilevel.attention.levels import Levels
from trilevel.conversion.assign import Classes
from trilevel.conversion.converted import save_converted
from trilevel.conversion.delta import DELTA_FILE, apply_delta, is_delta, read_delta, save_delta, save_delta_of
from trilevel.conversion.fit import train_only
from trilevel.conversion.load import load_encoder
from trilevel.conversion.multilevel import with_classes
from trilevel.conversion.source import Source, load_source
from trilevel.errors import CheckpointError, ConfigError
from trilevel.model.encoder import Encoder

# local, regional, global and dense heads in an order that must be sorted
CLASSES: Classes = np.array([[2, 0, 1], [3, 1, 0], [3, 3, 3]])
LEVELS = Levels(window=5, region_size=3, num_global_tokens=2)
NAMES = ("local", "regional", "global", "dense")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return load_source(save(make("bert"), tmp_path / "pretrained"))


def converted(source: Source, *, trained: str = "small") -> Encoder:
    """Under `CLASSES`, with what `trained` names moved as distillation would."""
    encoder = with_classes(source.encoder, CLASSES, LEVELS, [torch.randn(DIM) for _ in range(LAYERS)])
    train_only(encoder, trained)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in encoder.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    return encoder.requires_grad_(True).eval()


def report() -> dict[str, object]:
    return {"layers": [{"layer": i, "heads": [{"class": NAMES[c]} for c in row]} for i, row in enumerate(CLASSES)]}


@pytest.mark.parametrize("trained", ["levels", "small", "all"])
def test_source_and_delta_give_the_converted_encoder(source: Source, tmp_path: Path, trained: str) -> None:
    encoder = converted(source, trained=trained)
    again = apply_delta(save_delta(tmp_path / "delta", source, encoder, CLASSES), source)
    assert again.config == encoder.config
    assert not again.training
    ids = inputs("bert")
    assert torch.equal(again(ids), encoder(ids))
    assert (again(ids) - source.encoder(ids)).abs().max() > 0.01


def test_only_what_was_trained_is_kept(source: Source, tmp_path: Path) -> None:
    encoder = converted(source)
    kept = load_file(str(save_delta(tmp_path / "delta", source, encoder, CLASSES) / DELTA_FILE))
    # which weights those are is for the training to say
    train_only(encoder, "small")
    assert set(kept) == {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    # a block without levels has neither pooling nor scorer, and no weight matrix is there at all
    assert all(tensor.ndim == 1 or "pool_weight" in name or "scorer" in name for name, tensor in kept.items())


def test_a_converted_folder_says_its_classes(source: Source, tmp_path: Path) -> None:
    encoder = converted(source)
    loaded = load_encoder(save_converted(tmp_path / "converted", source, encoder, report()))
    delta = read_delta(save_delta_of(tmp_path / "delta", loaded))
    assert delta.classes.tolist() == CLASSES.tolist()
    assert (delta.source, delta.sha256) == (source.name, source.sha256)
    ids = inputs("bert")
    assert torch.equal(apply_delta(delta.folder, source)(ids), encoder(ids))


def test_a_pretrained_encoder_differs_in_nothing(source: Source, tmp_path: Path) -> None:
    delta = save_delta_of(tmp_path / "delta", source)
    assert load_file(str(delta / DELTA_FILE)) == {}
    assert read_delta(delta).classes.shape == (LAYERS, HEADS)
    ids = inputs("bert")
    assert torch.equal(apply_delta(delta, source)(ids), source.encoder(ids))


def test_another_source_is_refused(source: Source, tmp_path: Path) -> None:
    save_delta(tmp_path / "delta", source, converted(source), CLASSES)
    other = load_source(save(make("bert"), tmp_path / "other"))
    with pytest.raises(CheckpointError, match="was made from"):
        apply_delta(tmp_path / "delta", other)


def test_a_source_that_changed_since_is_refused(source: Source, tmp_path: Path) -> None:
    loaded = load_encoder(save_converted(tmp_path / "converted", source, converted(source), report()))
    save(make("bert"), tmp_path / "pretrained")
    with pytest.raises(CheckpointError, match="SHA-256"):
        save_delta_of(tmp_path / "delta", loaded)
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize("classes", [CLASSES[:2], np.full_like(CLASSES, 3)])
def test_classes_of_another_encoder(source: Source, tmp_path: Path, classes: Classes) -> None:
    with pytest.raises(ConfigError, match=r"do not fit|not what its classes make"):
        save_delta(tmp_path / "delta", source, converted(source), classes)


def test_wrong_places_of_heads_cost_room_and_nothing_else(source: Source, tmp_path: Path) -> None:
    encoder = converted(source)
    delta = save_delta(tmp_path / "delta", source, encoder, CLASSES[:, [0, 2, 1]])
    assert any(tensor.ndim == 2 and "in_proj" in name for name, tensor in load_file(str(delta / DELTA_FILE)).items())
    ids = inputs("bert")
    assert torch.equal(apply_delta(delta, source)(ids), encoder(ids))


def test_what_is_there_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="left alone"):
        save_delta(tmp_path / "mine", source, converted(source), CLASSES)
    save_delta(tmp_path / "delta", source, converted(source), CLASSES)
    newer = converted(source)
    save_delta(tmp_path / "delta", source, newer, CLASSES)
    ids = inputs("bert")
    assert torch.equal(apply_delta(tmp_path / "delta", source)(ids), newer(ids))


def test_damage(source: Source, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no delta of an encoder at"):
        read_delta(tmp_path / "none")
    assert not is_delta(tmp_path / "none")
    folder = save_delta(tmp_path / "delta", source, converted(source), CLASSES)
    assert is_delta(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"regional"', '"oblique"'))
    with pytest.raises(CheckpointError, match="describes no delta"):
        read_delta(folder)
    (folder / "config.json").write_text(config.replace('"regional"', "1"))
    with pytest.raises(CheckpointError, match="describes no delta"):
        read_delta(folder)
    (folder / "config.json").write_text(config.replace('"dense"', '"local"', 1))
    with pytest.raises(CheckpointError, match="does not fit"):
        apply_delta(folder, source)
    (folder / "config.json").write_text(config)
    (folder / DELTA_FILE).write_bytes(b"\0" + (folder / DELTA_FILE).read_bytes())
    with pytest.raises(CheckpointError, match="sha256"):
        apply_delta(folder, source)


def test_tensors_that_the_encoder_has_not(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_delta(tmp_path / "delta", source, converted(source), CLASSES)
    tensors = load_file(str(folder / DELTA_FILE))
    name = "stack.blocks.0.attention.out_proj.bias"
    for wrong, message in (
        ({**tensors, "more": torch.ones(1)}, "nothing of that name"),
        ({**tensors, name: tensors[name][1:]}, rf"\({DIM - 1},\)"),
        ({**tensors, name: tensors[name].double()}, "float64"),
    ):
        monkeypatch.setattr("trilevel.conversion.delta.read_tensors", lambda *_args, found=wrong: found)
        with pytest.raises(CheckpointError, match=message):
            apply_delta(folder, source)
