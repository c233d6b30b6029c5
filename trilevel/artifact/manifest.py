"""The artifact's folder: what it says of itself, written whole or not at all, refused when a byte of it changed.

Reading needs neither torch nor a tokenizer, so that a device can load an artifact with numpy and a runtime alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trilevel.errors import ArtifactError
from trilevel.model.folder import Kind, check_names, checked_file, find_folder, read_manifest, write_folder

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
PROBE_FILE = "probe.npz"
TOKENIZER_FILE = "tokenizer.json"
CARD_FILE = "MODEL_CARD.md"
REPORT_FILE = "report.json"
FILES = {MODEL_FILE, PROBE_FILE, TOKENIZER_FILE, CARD_FILE, REPORT_FILE}
ARTIFACT = Kind("artifact", "trilevel-artifact", 1, MANIFEST_FILE, ArtifactError, is_sealed=True)
PRECISIONS = ("float32", "int8", "int4")
TARGETS = ("portable", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """An input or output of the graph: its element type (numpy's name) and its axes, a size or a name that varies."""

    dtype: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact says of itself.

    Args:
        task: `embedding`, `classification`, `images` or `documents`: who makes inputs and reads outputs.
        name: of the model, for people.
        trilevel: version that wrote it.
        precision: of the weight products: `float32`, `int8` or `int4` (weights alone).
        target: `portable` (symmetric activations, every runtime) or `cpu` (unsigned ones); None in float32.
        inputs: of the graph, by name.
        outputs: of the graph, by name.
        settings: what the task needs beside the graph, such as labels and the longest input; JSON types.
        levels: what the heads see, for people.
    """

    task: str
    name: str
    trilevel: str
    precision: str
    target: str | None
    inputs: Mapping[str, Tensors]
    outputs: Mapping[str, Tensors]
    settings: Mapping[str, Any] = field(default_factory=dict)
    levels: Any = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` gives an equal manifest back."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        for name in ("inputs", "outputs"):
            values[name] = {key: {"dtype": own.dtype, "axes": list(own.axes)} for key, own in values[name].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """What `to_dict` made.

        Raises:
            ArtifactError: a key is missing or unknown, or a value is of the wrong kind.
        """
        known = {one.name for one in dataclasses.fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted(known - set(values))
        if unknown or missing:
            raise ArtifactError(f"{MANIFEST_FILE}: unknown keys {unknown}, missing keys {missing}. {_EXPORT_AGAIN}")
        texts = [values[name] for name in ("task", "name", "trilevel", "precision")]
        is_right = all(isinstance(text, str) for text in texts) and isinstance(values["settings"], Mapping)
        if not is_right or values["precision"] not in PRECISIONS or values["target"] not in (None, *TARGETS):
            raise ArtifactError(f"{MANIFEST_FILE}: a value is of the wrong kind or unknown. {_EXPORT_AGAIN}")
        tensors = {name: _tensors(name, values[name]) for name in ("inputs", "outputs")}
        return cls(**{**values, **tensors})


def labels_of(manifest: Manifest) -> list[str]:
    """Names of the classes, one for each of the output `logits`.

    Raises:
        ArtifactError: the manifest names others.
    """
    labels, output = manifest.settings.get("labels"), manifest.outputs.get("logits")
    is_right = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not is_right or output is None or output.axes[-1:] != (len(labels or ()),):
        raise ArtifactError(f"{MANIFEST_FILE}: labels are not as many texts as there are logits. {_EXPORT_AGAIN}")
    return list(labels or ())


_EXPORT_AGAIN = "Export the model again (trilevel export)."


def _tensors(name: str, values: Any) -> dict[str, Tensors]:
    if not isinstance(values, Mapping) or not values:
        raise ArtifactError(f"{MANIFEST_FILE}: {name} is no table of tensors. {_EXPORT_AGAIN}")
    found = {}
    for key, own in values.items():
        axes = own.get("axes") if isinstance(own, Mapping) else None
        is_right = isinstance(axes, list) and all(isinstance(axis, (int, str)) for axis in axes)
        if axes is None or not is_right or not isinstance(own.get("dtype"), str) or set(own) != {"dtype", "axes"}:
            raise ArtifactError(f"{MANIFEST_FILE}: {name}[{key!r}] has no dtype and axes. {_EXPORT_AGAIN}")
        found[key] = Tensors(dtype=own["dtype"], axes=tuple(axes))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact that was read: where it is, what it says, and which files are in it."""

    path: Path
    manifest: Manifest
    hashes: Mapping[str, str]

    def file(self, name: str) -> Path:
        """The path of a file, after its hash has been compared.

        Raises:
            ArtifactError: the artifact has none, or it was changed.
        """
        return checked_file(self.path, name, {"files": self.hashes}, ARTIFACT)

    def bytes_of(self, name: str) -> int:
        """Size of a file."""
        return (self.path / name).stat().st_size


def is_artifact(folder: str | Path) -> bool:
    """Whether a folder holds an artifact, whole or not."""
    found = find_folder(Path(folder))
    return found is not None and (found / MANIFEST_FILE).is_file()


def write_artifact(folder: str | Path, manifest: Manifest, files: Mapping[str, Callable[[Path], None]]) -> Artifact:
    """Write an artifact, replacing one that is there only when the new one is whole.

    Args:
        folder: to write; its parent is made if needed.
        manifest: what it says of itself.
        files: a function that writes to a path, by file name.

    Raises:
        ArtifactError: something else is there, the disk is full, ...; what was there is unchanged.
    """
    where = Path(folder)
    check_free(where)
    assert set(files) <= FILES
    write_folder(where, files, manifest.to_dict(), ARTIFACT)
    return read_artifact(where)


def check_free(folder: Path) -> None:
    """Raise `ArtifactError` unless nothing is there, an empty folder, or an artifact, which may be replaced."""
    if folder.exists() and not is_artifact(folder) and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ArtifactError(f"{folder} exists and is no artifact; it is left alone. Choose another folder.")


def read_artifact(folder: str | Path) -> Artifact:
    """Read an artifact and compare the hash of every file in it.

    Raises:
        ArtifactError: there is none; it is of another format or version, or damaged; it names a file that no artifact
            has, or one elsewhere.
    """
    found = find_folder(Path(folder))
    if found is None:
        raise ArtifactError(f"there is no artifact at {folder}. Make one with trilevel export.")
    raw = read_manifest(found, ARTIFACT)
    check_names(found, raw, FILES, ARTIFACT)
    artifact = Artifact(path=found, manifest=Manifest.from_dict(raw["config"]), hashes=raw["files"])
    for name in (MODEL_FILE, PROBE_FILE):
        if name not in artifact.hashes:
            raise ArtifactError(f"{found / MANIFEST_FILE} lists no {name}. {_EXPORT_AGAIN}")
    for name in artifact.hashes:
        artifact.file(name)
    return artifact
