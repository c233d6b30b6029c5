"""What an artifact says of itself comes back equal; whatever is not as it was written is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilevel.artifact import manifest as module
from trilevel.artifact.manifest import (
    ARTIFACT,
    CARD_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    PROBE_FILE,
    Artifact,
    Manifest,
    Tensors,
    is_artifact,
    read_artifact,
    write_artifact,
)
from trilevel.artifact.probe import Probe, read_probes, write_probes
from trilevel.errors import ArtifactError, TrilevelError
from trilevel.model import folder as folders

MANIFEST = Manifest(
    task="classification",
    name="reviews",
    trilevel="0.4.0",
    precision="int8",
    target="portable",
    inputs={"ids": Tensors(dtype="int64", axes=("batch", "tokens"))},
    outputs={"logits": Tensors(dtype="float32", axes=("batch", 2))},
    settings={"labels": ["bad", "good"], "max_tokens": 512},
    levels=[6, 3, 1],
)
PROBE = Probe(
    inputs={"ids": np.arange(6, dtype=np.int64).reshape(2, 3)}, outputs={"logits": np.ones((2, 2), np.float32)}
)


def files(**others: str) -> dict[str, Callable[[Path], None]]:
    """A graph that nobody runs, a probe, and other files by content."""

    def text(content: str) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.write_text(content)

        return write

    own = {MODEL_FILE: text("a graph " * 500), PROBE_FILE: lambda path: write_probes([PROBE], path)}
    return own | {name: text(content) for name, content in others.items()}


@pytest.fixture
def written(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "made", MANIFEST, files(**{CARD_FILE: "# reviews"}))


def test_comes_back_equal(written: Artifact) -> None:
    again = read_artifact(written.path)
    assert again.manifest == MANIFEST
    assert again.file(CARD_FILE).read_text() == "# reviews"
    assert again.bytes_of(MODEL_FILE) == 4000
    (probe,) = read_probes(again)
    np.testing.assert_array_equal(probe.inputs["ids"], PROBE.inputs["ids"])
    np.testing.assert_array_equal(probe.outputs["logits"], PROBE.outputs["logits"])


def test_every_flipped_byte_is_seen(written: Artifact, tmp_path: Path) -> None:
    for name in (MANIFEST_FILE, MODEL_FILE, PROBE_FILE, CARD_FILE):
        whole = (written.path / name).read_bytes()
        for place in range(0, len(whole), 97 if name != MANIFEST_FILE else 1):
            for mask in (0x01, 0x20, 0xFF):
                damaged = bytearray(whole)
                damaged[place] ^= mask
                (written.path / name).write_bytes(damaged)
                with pytest.raises(ArtifactError):
                    read_artifact(written.path)
        (written.path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError):
            read_artifact(written.path)
        (written.path / name).write_bytes(whole)
    read_artifact(written.path)


def sealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and seal it again, as someone does who knows how."""
    values = json.loads((folder / MANIFEST_FILE).read_text())
    values["sha256"] = folders._UNSEALED
    change(values)
    text = json.dumps(values, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text.replace(folders._UNSEALED, folders._seal(text)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=2), "format version 2.*reads 1"),
        (lambda v: v.update(format="other"), "no trilevel artifact"),
        (lambda v: v["files"].update({"../evil": "0"}), "lists '../evil'"),
        (lambda v: v["files"].update({"evil.py": "0"}), "lists 'evil.py'"),
        (lambda v: v["files"].pop(PROBE_FILE), "lists no probe.npz"),
        (lambda v: v.update(files=[]), "lacks its files"),
        (lambda v: v.update(more=1), "unknown keys"),
        (lambda v: v["config"].update(more=1), "unknown keys \\['more'\\]"),
        (lambda v: v["config"].pop("task"), "missing keys \\['task'\\]"),
        (lambda v: v["config"].update(precision="int3"), "wrong kind or unknown"),
        (lambda v: v["config"].update(task=7), "wrong kind"),
        (lambda v: v["config"].update(settings=[]), "wrong kind"),
        (lambda v: v["config"].update(inputs={}), "no table of tensors"),
        (lambda v: v["config"]["inputs"].update(ids={"dtype": "int64"}), "no dtype and axes"),
    ],
)
def test_what_does_not_fit_is_said(written: Artifact, change: Callable[[dict[str, Any]], object], message: str) -> None:
    sealed(written.path, change)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(written.path)


def test_a_link_out_of_the_folder_is_refused(written: Artifact, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(written.path / CARD_FILE, outside)
    (written.path / CARD_FILE).symlink_to(outside)
    with pytest.raises(ArtifactError, match="links are not followed"):
        read_artifact(written.path)


def test_nothing_there_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no artifact.*trilevel export"):
        read_artifact(tmp_path / "nothing")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ArtifactError, match=r"no manifest.json"):
        read_artifact(tmp_path)
    with pytest.raises(ArtifactError, match="is no artifact; it is left alone"):
        write_artifact(tmp_path, MANIFEST, files())
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_full_disk_leaves_the_old_one_whole(written: Artifact) -> None:
    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match=r"No space left.*unchanged"):
        write_artifact(written.path, replace(MANIFEST, name="new"), {**files(), MODEL_FILE: full})
    assert read_artifact(written.path).manifest == MANIFEST
    assert [path.name for path in written.path.parent.iterdir()] == ["made"]


def test_probes_of_another_graph_are_refused(tmp_path: Path) -> None:
    other = replace(PROBE, outputs={"vector": np.ones((2, 2), np.float32)})
    own = files() | {PROBE_FILE: lambda path: write_probes([other], path)}
    with pytest.raises(ArtifactError, match="does not hold the graph's inputs"):
        read_probes(write_artifact(tmp_path / "made", MANIFEST, own))


def test_probes_with_pickles_are_refused(tmp_path: Path) -> None:
    def pickled(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=True, **{"0.in.ids": np.array([{}], dtype=object)})

    with pytest.raises(ArtifactError, match="cannot be read"):
        read_probes(write_artifact(tmp_path / "made", MANIFEST, files() | {PROBE_FILE: pickled}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=9), own, max_size=3),
    max_leaves=9,
)


@settings(max_examples=150, deadline=None)
@given(config=JSON | st.fixed_dictionaries(dict.fromkeys(MANIFEST.to_dict(), JSON)))
def test_no_configuration_does_worse_than_an_error(config: Any) -> None:
    try:
        found = Manifest.from_dict(config) if isinstance(config, dict) else None
    except TrilevelError:
        return
    assert found is None or Manifest.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_is_artifact(written: Artifact, tmp_path: Path) -> None:
    assert is_artifact(written.path)
    assert not is_artifact(tmp_path)
    assert not is_artifact(tmp_path / "nothing")
    assert ARTIFACT.manifest == MANIFEST_FILE == module.MANIFEST_FILE
