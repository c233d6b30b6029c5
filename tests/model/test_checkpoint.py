from __future__ import annotations

import errno
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trilevel.errors import CheckpointError
from trilevel.model import checkpoint, folder
from trilevel.model.checkpoint import has_checkpoint, load_checkpoint, read_config, save_checkpoint
from trilevel.model.folder import sha256_of

CONFIG = {"dim": 5, "names": ["a", "b"], "rate": 0.1}


def make_model(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))


def weight(model: nn.Module) -> nn.Parameter:
    return model.get_parameter("0.weight")


def trained(model: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(7, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    model = make_model()
    optimizer = trained(model)
    save_checkpoint(tmp_path / "run", model=model, config=CONFIG, optimizer=optimizer, state={"step": 2})
    return tmp_path / "run", model, optimizer


def snapshot(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in where.iterdir()}


def names(where: Path) -> set[str]:
    return {path.name for path in where.iterdir()}


def edit_manifest(where: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((where / "config.json").read_text())
    change(values)
    (where / "config.json").write_text(json.dumps(values))


# definition


def test_weights_optimizer_state_and_config_come_back(tmp_path: Path) -> None:
    where, model, optimizer = saved(tmp_path)
    other = make_model()
    other_optimizer = trained(other, steps=1)
    found = load_checkpoint(where, model=other, optimizer=other_optimizer)
    assert found.config == read_config(where) == CONFIG
    assert found.state == {"step": 2}
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    ours, theirs = other_optimizer.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert isinstance(ours["param_groups"][0]["betas"], tuple)
    for index, entry in theirs["state"].items():
        for key, value in entry.items():
            assert torch.equal(ours["state"][index][key], value)


def test_random_state_comes_back(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.normal()  # noqa: NPY002
    where, _, _ = saved(tmp_path)

    def draw() -> tuple[float, ...]:
        return (random.gauss(0, 1), random.random(), np.random.normal(), torch.rand(1).item())  # noqa: NPY002

    wanted = draw()
    draw()
    load_checkpoint(where, restore_random=True)
    assert draw() == wanted


def test_weights_alone(tmp_path: Path) -> None:
    model = make_model()
    save_checkpoint(tmp_path / "run", model=model, config=CONFIG)
    assert names(tmp_path / "run") == {"config.json", "model.safetensors"}
    other = make_model()
    assert load_checkpoint(tmp_path / "run", model=other).state == {}
    assert torch.equal(weight(other), weight(model))
    with pytest.raises(CheckpointError, match=r"holds no optimizer.safetensors; it has model.safetensors"):
        load_checkpoint(tmp_path / "run", optimizer=trained(other))
    with pytest.raises(CheckpointError, match=r"holds no random.safetensors"):
        load_checkpoint(tmp_path / "run", restore_random=True)


def test_tied_and_strided_weights_are_written(tmp_path: Path) -> None:
    model = make_model()
    model.register_parameter("tied", weight(model))
    model.register_buffer("strided", torch.arange(12.0).view(3, 4).t())
    save_checkpoint(tmp_path / "run", model=model, config={})
    other = make_model()
    other.register_parameter("tied", weight(other))
    other.register_buffer("strided", torch.zeros(4, 3))
    load_checkpoint(tmp_path / "run", model=other)
    assert torch.equal(other.get_buffer("strided"), model.get_buffer("strided"))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    where, _, _ = saved(tmp_path)
    assert {path.suffix for path in where.iterdir()} == {".safetensors", ".json"}


# writing is atomic


def test_a_new_checkpoint_replaces_the_old(tmp_path: Path) -> None:
    where, model, _ = saved(tmp_path)
    save_checkpoint(where, model=model, config={"dim": 7})
    assert names(where) == {"config.json", "model.safetensors"}
    assert names(tmp_path) == {"run"}
    assert read_config(where) == {"dim": 7}


def test_full_disk_leaves_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, model, optimizer = saved(tmp_path)
    before = snapshot(where)
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "optimizer.safetensors":
            write_bytes(path, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"could not be written.*No space left.*unchanged. Free space"):
        save_checkpoint(where, model=model, config=CONFIG, optimizer=optimizer)
    assert snapshot(where) == before
    assert names(tmp_path) == {"run"}
    load_checkpoint(where, model=make_model())


@pytest.mark.parametrize("cut_at", [1, 2])
def test_a_crash_between_the_renames_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    where, model, _ = saved(tmp_path)
    rename, calls = Path.rename, 0

    def crash(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == cut_at:
            # no OSError: nothing after it runs, as when the machine stops
            raise SystemError("power cut")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(SystemError):
            save_checkpoint(where, model=model, config={"dim": 7})
    assert has_checkpoint(where)
    assert read_config(where) == CONFIG
    load_checkpoint(where, model=make_model())
    save_checkpoint(where, model=model, config={"dim": 7})
    assert read_config(where) == {"dim": 7}
    assert names(tmp_path) == {"run"}


def test_a_refused_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, model, _ = saved(tmp_path)
    before, rename = snapshot(where), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, "disk error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="disk error"):
        save_checkpoint(where, model=model, config={})
    assert snapshot(where) == before
    assert names(tmp_path) == {"run"}


def test_every_file_and_the_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(folder, "_sync", lambda path: synced.append(path.name))
    where, _, _ = saved(tmp_path)
    assert names(where) < set(synced)
    assert synced[-1] == tmp_path.name
    assert synced[-2].endswith(".tmp")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".run.x1.tmp").mkdir()
    (tmp_path / ".run.x1.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".runner.x1.tmp").mkdir()
    saved(tmp_path)
    assert names(tmp_path) == {".runner.x1.tmp", "run"}


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        where, _, _ = saved(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(where.stat().st_mode) == 0o755


def test_a_link_to_a_folder_is_followed_when_writing(tmp_path: Path) -> None:
    where, model, _ = saved(tmp_path)
    link = tmp_path / "latest"
    link.symlink_to(where)
    save_checkpoint(link, model=model, config={"dim": 7})
    assert link.is_symlink()
    assert read_config(where) == read_config(link) == {"dim": 7}


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(CheckpointError, match="exists and is no checkpoint; it is left alone"):
        save_checkpoint(tmp_path, model=make_model(), config={})
    with pytest.raises(CheckpointError, match="exists and is no checkpoint; it is left alone"):
        save_checkpoint(tmp_path / "thesis.txt", model=make_model(), config={})
    assert names(tmp_path) == {"thesis.txt"}
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", model=make_model(), config={})
    assert has_checkpoint(tmp_path / "empty")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(tmp_path / "run", model=make_model(), config={})


# reading refuses what is not as written


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_changed_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    where, model, optimizer = saved(tmp_path)
    data = bytearray((where / name).read_bytes())
    data[-3] ^= 1
    (where / name).write_bytes(data)

    def load() -> None:
        load_checkpoint(where, model=model, optimizer=optimizer, restore_random=True)

    with pytest.raises(CheckpointError, match=f"{name} has sha256 .* it was changed or damaged. Restore"):
        load()
    (where / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}, which its config.json lists"):
        load()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*run\. Check the path"):
        load_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"has no config\.json; it is no trilevel checkpoint"):
        load_checkpoint(tmp_path)
    assert not has_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("\xff", "does not say format|cannot be read"),
        ("[]", "does not say format='trilevel-checkpoint'"),
        ('{"format": "other"}', "does not say format='trilevel-checkpoint'"),
        ('{"format": "trilevel-checkpoint", "version": 9}', "has format version 9 and this trilevel reads 1"),
        ('{"format": "trilevel-checkpoint", "version": 1}', "lacks its files or config table"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, text: str, match: str) -> None:
    where, _, _ = saved(tmp_path)
    (where / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=match):
        read_config(where)


def test_unknown_keys_and_files_are_refused(tmp_path: Path) -> None:
    where, _, _ = saved(tmp_path)
    edit_manifest(where, lambda values: values.update(extra=1))
    with pytest.raises(CheckpointError, match=r"unknown keys \['extra'\]"):
        load_checkpoint(where)
    edit_manifest(where, lambda values: (values.pop("extra"), values["files"].update({"../../secret": "0"})))
    with pytest.raises(CheckpointError, match=r"lists '../../secret'; a checkpoint holds model.safetensors, "):
        load_checkpoint(where)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    where, model, _ = saved(tmp_path)
    (where / name).rename(tmp_path / name)
    (where / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        load_checkpoint(where, model=model)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    where, model, _ = saved(tmp_path)
    (where / "model.safetensors").write_bytes(b"not tensors")
    digest = sha256_of(where / "model.safetensors")
    edit_manifest(where, lambda values: values["files"].update({"model.safetensors": digest}))
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        load_checkpoint(where, model=model)
    (where / "state.json").write_bytes(b"{")
    digest = sha256_of(where / "state.json")
    edit_manifest(where, lambda values: values["files"].update({"state.json": digest}))
    with pytest.raises(CheckpointError, match=r"state\.json is no JSON"):
        load_checkpoint(where)


def test_another_model_is_refused_and_unchanged(tmp_path: Path) -> None:
    where, _, _ = saved(tmp_path)
    wider, longer = make_model(7), nn.Sequential(*make_model(), nn.Linear(5, 2))
    before = [p.clone() for p in (*wider.parameters(), *longer.parameters())]
    with pytest.raises(
        CheckpointError, match=r"0.weight has shape \(5, 3\) and the model \(7, 3\). Build the model from"
    ):
        load_checkpoint(where, model=wider)
    with pytest.raises(CheckpointError, match=r"missing 2.bias, 2.weight; unknown nothing"):
        load_checkpoint(where, model=longer)
    with pytest.raises(CheckpointError, match=r"missing nothing; unknown 1.bias, 1.weight"):
        load_checkpoint(where, model=make_model()[:1])
    after = (*wider.parameters(), *longer.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    where, model, _ = saved(tmp_path)
    fewer = torch.optim.AdamW([weight(model)])
    with pytest.raises(CheckpointError, match=r"of other parameters: this model's groups have \[1\]"):
        load_checkpoint(where, optimizer=fewer)
    wider = torch.optim.AdamW(make_model(7).parameters())
    with pytest.raises(CheckpointError, match=r"the optimizer state '0.exp_avg' has shape \(5, 3\) and its parameter"):
        load_checkpoint(where, optimizer=wider)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    where, model, _ = saved(tmp_path)
    before = snapshot(where)
    with pytest.raises(CheckpointError, match="config holds what JSON cannot"):
        save_checkpoint(where, model=model, config={"path": tmp_path})
    with pytest.raises(CheckpointError, match="state holds what JSON cannot"):
        save_checkpoint(where, model=model, config={}, state={"model": model})
    assert snapshot(where) == before


def test_damaged_random_state_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(checkpoint, "random_state", lambda: ({"torch": torch.zeros(3)}, {"numpy": []}))
    save_checkpoint(tmp_path / "run", model=model, config={}, state={})
    with pytest.raises(CheckpointError, match="the random state of the checkpoint cannot be used"):
        load_checkpoint(tmp_path / "run", restore_random=True)
