"""Whether the segments of an artifact answer as torch did, one after another."""

from __future__ import annotations

from trilevel.artifact.manifest import PATHS_FILE, Artifact
from trilevel.artifact.probe import read_probes
from trilevel.artifact.runtime.predictor import Precision, Runtime
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.artifact.verify import INTEGER_BFLOAT16_TOLERANCE, INTEGER_TOLERANCE, TOLERANCES, Parity, compared
from trilevel.errors import ArtifactError


def path_parity(
    artifact: Artifact, runtime: Runtime, *, threads: int | None = None, precision: Precision = "float32"
) -> dict[str, Parity]:
    """How the logits behind all segments of each family differ from those expected, by the family's name.

    Raises:
        ArtifactError: the artifact holds no probes of its paths, or the runtime cannot run a segment.
        MissingExtraError: the runtime is not installed.
    """
    found = {}
    for family, segments in artifact.manifest.families.items():
        steps = SegmentSteps(artifact, family, runtime, threads=threads, precision=precision)
        pairs = []
        for probe in read_probes(artifact, PATHS_FILE):
            arrays = dict(probe.inputs)
            for segment in range(len(segments)):
                arrays, logits = steps.run(segment, arrays)
                pairs.append((logits, probe.outputs["logits"][:, segment]))
        kind = family.partition("/")[0]
        if kind == "int8":
            limit = INTEGER_TOLERANCE if precision == "float32" else INTEGER_BFLOAT16_TOLERANCE
        else:
            limit = TOLERANCES["float32", precision]
        found[family] = compared(pairs, runtime=runtime, precision=precision, limit=limit)
    return found


def check_path_probes(artifact: Artifact, runtime: Runtime, *, threads: int | None = None) -> None:
    """Raise `ArtifactError` unless all segments give the answers they were made to give."""
    for family, parity in path_parity(artifact, runtime, threads=threads).items():
        if not parity.holds:
            raise ArtifactError(
                f"{artifact.path}: the segments of {family} differ in {runtime} by {parity.difference:.2g} of the "
                f"largest value, {parity.tolerance:g} is allowed. Use another runtime, or route the model again."
            )
