"""Whether the segments of an artifact answer as torch did, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trilevel.artifact.manifest import PATHS_FILE, Artifact
from trilevel.artifact.probe import Probe, read_probes
from trilevel.artifact.runtime.focus import OUT
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.artifact.verify import Parity, compared, tolerance
from trilevel.errors import ArtifactError
from trilevel.routing.paths import Family


def path_parity(artifact: Artifact, steps: Mapping[str, SegmentSteps]) -> dict[str, Parity]:
    """How the outputs behind all segments of each open family differ from those expected, by the family's name.

    Raises:
        ArtifactError: the artifact holds no probes of its paths, or the runtime cannot run a segment.
    """
    probes = read_probes(artifact, PATHS_FILE)
    return {name: _parity(probes, name, steps[name]) for name in artifact.manifest.families if name in steps}


def _parity(probes: Sequence[Probe], family: str, steps: SegmentSteps) -> Parity:
    pairs = []
    for probe in probes:
        arrays = dict(probe.inputs)
        (expected,) = probe.outputs.values()
        for segment in range(steps.num_segments):
            # one unit that is ranked otherwise by a rounding would change all that is behind it
            arrays, found = steps.run(segment, arrays, ranks=expected[:, 0])
            is_out = (found == OUT) & (expected[:, segment] == OUT)
            pairs.append((np.where(is_out, 0, found), np.where(is_out, 0, expected[:, segment])))
    limit = tolerance(Family.parse(family).precision, steps.precision)
    return compared(pairs, runtime=steps.runtime, precision=steps.precision, limit=limit)


def check_path_probes(artifact: Artifact, steps: Mapping[str, SegmentSteps]) -> None:
    """Raise `ArtifactError` unless all segments give the answers they were made to give."""
    for family, parity in path_parity(artifact, steps).items():
        if not parity.holds:
            raise ArtifactError(
                f"{artifact.path}: the segments of {family} differ in {parity.runtime} by {parity.difference:.2g} of "
                f"the largest value, {parity.tolerance:g} is allowed. Use another runtime, or route the model again."
            )
