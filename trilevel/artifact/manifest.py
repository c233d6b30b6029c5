"""The artifact's folder: what it says of itself, written whole or not at all, refused when a byte of it changed.

Reading needs neither torch nor a tokenizer, so that a device can load an artifact with numpy and a runtime alone.
"""

from __future__ import annotations

import dataclasses
import re
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
PATHS_FILE = "paths.npz"
ROUTER_FILE = "router.json"
CERTIFICATE_FILE = "certificate.json"
LATENCY_FILE = "latency.json"
ROUTING_FILE = "routing.json"
PAGE_FILE = "report.html"
KNOWN_FILE = "known.txt"
"""Beginnings of the SHA-256 of what the model was trained on, one a line."""
FILES = {MODEL_FILE, PROBE_FILE, TOKENIZER_FILE, CARD_FILE, REPORT_FILE}
ROUTING_FILES = {PATHS_FILE, ROUTER_FILE, CERTIFICATE_FILE, LATENCY_FILE, ROUTING_FILE, PAGE_FILE, KNOWN_FILE}
"""Of an artifact with paths."""
FULL_FAMILY = "float32"
"""Of the full path; without segments of its own it is the whole graph, in one."""
NEXT = "next_"
"""Begins the name of what a segment gives to the input of that name of the next one."""
_FAMILY = re.compile(r"[a-z][a-z0-9_]*(/[a-z][a-z0-9_+=.]*)*")
ARTIFACT = Kind("artifact", "trilevel-artifact", 1, MANIFEST_FILE, ArtifactError, is_sealed=True)
PRECISIONS = ("float32", "int8", "int4")
NATIVE = "native"
TARGETS = ("portable", "cpu", NATIVE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """An input or output of the graph: its element type (numpy's name) and its axes, a size or a name that varies."""

    dtype: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A graph that is a piece of the model: what it takes and gives, by name."""

    inputs: Mapping[str, Tensors]
    outputs: Mapping[str, Tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact says of itself.

    Args:
        task: `embedding`, `classification`, `images` or `documents`: who makes inputs and reads outputs.
        name: of the model, for people.
        trilevel: version that wrote it.
        precision: of the weight products: `float32`, `int8` or `int4` (weights alone).
        target: `portable` (symmetric activations, every runtime) or `cpu` (unsigned ones); None in float32. `native`:
            attention is an operator of trilevel's kernels, in ONNX Runtime alone.
        inputs: of the graph, by name.
        outputs: of the graph, by name.
        settings: what the task needs beside the graph, such as labels and the longest input; JSON types.
        levels: what the heads see, for people.
        families: of paths, by name: the segments that are run one after another, each a file; none for an artifact with
            one path, the graph.
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
    families: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` gives an equal manifest back."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        for name in ("inputs", "outputs"):
            values[name] = _table(values[name])
        # older artifacts have none
        families = values.pop("families")
        if families:
            values["families"] = {
                name: [{"inputs": _table(one.inputs), "outputs": _table(one.outputs)} for one in segments]
                for name, segments in families.items()
            }
        return values

    @property
    def is_native(self) -> bool:
        """Whether the graph has operators of trilevel's kernels, which ONNX Runtime alone can run."""
        return self.target == NATIVE

    @property
    def full_path(self) -> str:
        """The path that all others are measured against: the end of the float family, or the whole graph."""
        return f"{FULL_FAMILY}/{len(self.families.get(FULL_FAMILY, (None,)))}"

    @property
    def segment_files(self) -> dict[str, tuple[str, int]]:
        """The family and number of each segment, by its file."""
        return {
            segment_file(family, number): (family, number)
            for family, segments in self.families.items()
            for number in range(len(segments))
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """What `to_dict` made.

        Raises:
            ArtifactError: a key is missing or unknown, or a value is of the wrong kind.
        """
        values = {"families": {}} | dict(values)
        known = {one.name for one in dataclasses.fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted(known - set(values))
        if unknown or missing:
            raise ArtifactError(f"{MANIFEST_FILE}: unknown keys {unknown}, missing keys {missing}. {_EXPORT_AGAIN}")
        texts = [values[name] for name in ("task", "name", "trilevel", "precision")]
        is_right = all(isinstance(text, str) for text in texts) and isinstance(values["settings"], Mapping)
        if not is_right or values["precision"] not in PRECISIONS or values["target"] not in (None, *TARGETS):
            raise ArtifactError(f"{MANIFEST_FILE}: a value is of the wrong kind or unknown. {_EXPORT_AGAIN}")
        tensors = {name: _tensors(name, values[name]) for name in ("inputs", "outputs")}
        return cls(**{**values, **tensors, "families": _families(values["families"])})


def segment_file(family: str, number: int) -> str:
    """The name of the file of a segment, numbered from 0."""
    return f"{family.replace('/', '-').replace('=', '-')}-{number + 1}.onnx"


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


def _table(tensors: Mapping[str, Tensors]) -> dict[str, Any]:
    return {key: {"dtype": own.dtype, "axes": list(own.axes)} for key, own in tensors.items()}


def _families(values: Any) -> dict[str, tuple[Segment, ...]]:
    # names become those of files
    if not isinstance(values, Mapping) or not all(_FAMILY.fullmatch(str(name)) for name in values):
        raise ArtifactError(f"{MANIFEST_FILE}: families is no table with plain names. {_EXPORT_AGAIN}")
    found = {}
    for name, segments in values.items():
        if not isinstance(segments, list) or not segments:
            raise ArtifactError(f"{MANIFEST_FILE}: the family {name!r} has no segments. {_EXPORT_AGAIN}")
        found[name] = tuple(_segment(one, f"segment {number} of {name}") for number, one in enumerate(segments, 1))
    return found


def _segment(values: Any, where: str) -> Segment:
    if not isinstance(values, Mapping) or set(values) != {"inputs", "outputs"}:
        raise ArtifactError(f"{MANIFEST_FILE}: {where} has no inputs and outputs. {_EXPORT_AGAIN}")
    inputs, outputs = (_tensors(f"{where}, {side}", values[side]) for side in ("inputs", "outputs"))
    return Segment(inputs=inputs, outputs=outputs)


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
    """An artifact that was read: where it is, what it says, which files are in it, and the graph that runtimes open."""

    path: Path
    manifest: Manifest
    hashes: Mapping[str, str]
    graph: str = MODEL_FILE

    def segment(self, family: str, number: int) -> Artifact:
        """The artifact with a segment, numbered from 0, in place of its graph.

        Raises:
            ArtifactError: there is none.
        """
        segments = self.manifest.families.get(family, ())
        if not 0 <= number < len(segments):
            known = ", ".join(f"{name} with {len(own)}" for name, own in self.manifest.families.items()) or "none"
            raise ArtifactError(f"{self.path} has no segment {number + 1} of {family!r}; its families are: {known}.")
        own = dataclasses.replace(self.manifest, inputs=segments[number].inputs, outputs=segments[number].outputs)
        return dataclasses.replace(self, manifest=own, graph=segment_file(family, number))

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
    assert set(files) <= FILES | (ROUTING_FILES if manifest.families else set()) | set(manifest.segment_files)
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
    manifest = Manifest.from_dict(raw["config"])
    segments = set(manifest.segment_files)
    check_names(found, raw, FILES | (ROUTING_FILES | segments if segments else set()), ARTIFACT)
    artifact = Artifact(path=found, manifest=manifest, hashes=raw["files"])
    for name in (MODEL_FILE, PROBE_FILE, *sorted(segments)):
        if name not in artifact.hashes:
            raise ArtifactError(f"{found / MANIFEST_FILE} lists no {name}. {_EXPORT_AGAIN}")
    for name in artifact.hashes:
        artifact.file(name)
    return artifact
