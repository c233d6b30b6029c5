"""Inputs with the outputs that the exporter saw: what every load compares before it serves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import PROBE_FILE, Artifact
from trilevel.errors import ArtifactError

Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One call of the graph: arrays by the names of its inputs and outputs."""

    inputs: Arrays
    outputs: Arrays


def write_probes(probes: Sequence[Probe], path: Path) -> None:
    """Write probes as one .npz without pickles."""
    arrays = {
        f"{index}.{kind}.{name}": array
        for index, probe in enumerate(probes)
        for kind, own in (("in", probe.inputs), ("out", probe.outputs))
        for name, array in own.items()
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    path.write_bytes(buffer.getvalue())


def read_probes(artifact: Artifact, name: str = PROBE_FILE) -> list[Probe]:
    """The probes of an artifact, or those in another of its files.

    Raises:
        ArtifactError: the file is damaged or holds none.
    """
    path = artifact.file(name)
    found: dict[int, dict[str, dict[str, npt.NDArray[np.generic]]]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                index, kind, name = key.split(".", 2)
                found.setdefault(int(index), {"in": {}, "out": {}})[kind][name] = arrays[key]
    # numpy and zipfile raise errors of many classes for damaged files
    except Exception as error:
        raise ArtifactError(f"{path} cannot be read ({error}). Export the model again.") from error
    probes = [Probe(inputs=own["in"], outputs=own["out"]) for _, own in sorted(found.items())]
    wanted = set(artifact.manifest.inputs), set(artifact.manifest.outputs)
    if not probes or any((set(probe.inputs), set(probe.outputs)) != wanted for probe in probes):
        raise ArtifactError(f"{path} does not hold the graph's inputs and outputs. Export the model again.")
    return probes
