"""What a worker opens: an artifact in a runtime, checked against its own probes before it answers anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, final

from trilevel.artifact.manifest import Artifact, read_artifact
from trilevel.artifact.path_probes import check_path_probes
from trilevel.artifact.platform import isa_class
from trilevel.artifact.routed import RoutedPredictor, has_paths
from trilevel.artifact.runtime.predictor import Predictor, load_predictor
from trilevel.artifact.verify import check_probes
from trilevel.errors import ArtifactError
from trilevel.routing.certificate import Platform, digest
from trilevel.serving.requests import Arrays

OPENER = f"{__name__}:open_artifact"


@final
class WholeRunner:
    """An artifact with one path, its graph: family and segment say nothing."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    @property
    def facts(self) -> Mapping[str, Any]:
        """The platform; no path but one."""
        own = self._predictor
        platform = Platform(runtime=own.runtime, version=own.version, isa=isa_class(), precision=own.precision)
        return {"platform": dataclasses.asdict(platform), "is_routed": False, "reason": ""}

    def run(self, family: str, segment: int, arrays: Arrays) -> tuple[Arrays, Arrays]:
        """All outputs of the graph."""
        return {}, self._predictor.run(arrays)


@final
class RoutedRunner:
    """The segments of an artifact with paths, and its whole graph."""

    def __init__(self, predictor: RoutedPredictor, output: str) -> None:
        self._predictor, self._output = predictor, output

    @property
    def facts(self) -> Mapping[str, Any]:
        """The platform, and whether the certificate is of it."""
        own = self._predictor
        is_routed = own.rule is not None
        return {"platform": dataclasses.asdict(own.platform), "is_routed": is_routed, "reason": own.reason}

    def run(self, family: str, segment: int, arrays: Arrays) -> tuple[Arrays, Arrays]:
        """State and output of one segment."""
        state, outputs = self._predictor.steps[family].run(segment, arrays)
        return state, {self._output: outputs}


def open_artifact(options: Mapping[str, Any]) -> WholeRunner | RoutedRunner:
    """The artifact of `folder`, which must still be `version`, in `runtime` with so many `threads`.

    Raises:
        ArtifactError: it is damaged, another one, or gives other answers than it was made to give.
        MissingExtraError: the runtime is not installed.
    """
    artifact = read_artifact(options["folder"])
    if (found := version_of(artifact)) != options["version"]:
        raise ArtifactError(f"{artifact.path} is now version {found}; {options['version']} was to be opened.")
    runtime, threads = options["runtime"], options["threads"]
    if not has_paths(artifact):
        whole = load_predictor(artifact, runtime, threads=threads)
        check_probes(artifact, whole)
        return WholeRunner(whole)
    routed = RoutedPredictor(artifact, runtime, threads=threads)
    check_probes(artifact, routed.whole)
    if routed.rule is not None:
        check_path_probes(artifact, routed.steps)
    (output,) = artifact.manifest.outputs
    return RoutedRunner(routed, output)


def version_of(artifact: Artifact) -> str:
    """The version of an artifact: the beginning of the hash of all files in it and of what it says of itself."""
    return digest([dict(artifact.hashes), artifact.manifest.to_dict()])[:12]
