"""Which runtimes are installed, and what each makes of an artifact's probes."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from trilevel.artifact.manifest import Artifact
from trilevel.artifact.probe import read_probes
from trilevel.artifact.runtime.predictor import Precision, Runtime, load_predictor
from trilevel.artifact.verify import Parity, integer_kernels, parity
from trilevel.errors import ArtifactError, InputError

PACKAGES: dict[Runtime, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "torch": ("torch", "onnx"),
}
_X86 = ("x86_64", "amd64", "i386", "i686")


def installed(artifact: Artifact | None = None) -> list[Runtime]:
    """The runtimes whose packages are there, of those that can run an artifact if one is given."""
    is_native = artifact is not None and artifact.manifest.is_native
    known: tuple[Runtime, ...] = ("onnxruntime",) if is_native else get_args(Runtime)
    return [name for name in known if all(map(importlib.util.find_spec, PACKAGES[name]))]


def default_runtime(artifact: Artifact | None = None) -> Runtime:
    """OpenVINO on x86 where it is installed and can run the artifact, else ONNX Runtime, installed or not."""
    if artifact is not None and artifact.manifest.is_native:
        return "onnxruntime"
    has_openvino = importlib.util.find_spec("openvino") is not None
    return "openvino" if has_openvino and platform.machine().lower() in _X86 else "onnxruntime"


def precisions(runtime: Runtime) -> tuple[Precision, ...]:
    """Those that a runtime computes in."""
    return ("float32", "bfloat16") if runtime == "openvino" else ("float32",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a runtime made of the probes.

    Attributes:
        runtime, precision: which.
        version: of the runtime; empty if it could not be opened.
        parity: with what was expected; None if it could not be run.
        integer_kernels: executed weight products that are computed in integers; None where they were not counted.
        error: why it could not be run; empty if it could.
    """

    runtime: Runtime
    precision: Precision
    version: str = ""
    parity: Parity | None = None
    integer_kernels: int | None = None
    error: str = ""

    @property
    def holds(self) -> bool:
        """Whether the answers are those expected."""
        return self.parity is not None and self.parity.holds

    @property
    def said(self) -> str:
        """The result in a few words."""
        if self.parity is None:
            return self.error
        state = "within" if self.parity.holds else "ABOVE"
        return f"{self.parity.difference:.1e} of the largest value, {state} {self.parity.tolerance:g}"


def check_runtimes(
    artifact: Artifact,
    runtimes: Sequence[Runtime],
    *,
    chosen: Sequence[Precision] = ("float32",),
    threads: int | None = None,
    tell: Callable[[str], None] = lambda _what: None,
) -> list[Checked]:
    """Run the probes in each runtime, in each of the chosen precisions that it has.

    Raises:
        MissingExtraError: a runtime is not installed.
        ConfigError: one is unknown.
    """
    found = []
    for runtime in runtimes:
        for precision in precisions(runtime):
            if precision in chosen:
                tell(f"comparing with {runtime} in {precision}")
                found.append(_check(artifact, runtime, precision, threads))
    return found


def _check(artifact: Artifact, runtime: Runtime, precision: Precision, threads: int | None) -> Checked:
    version = ""
    try:
        predictor = load_predictor(artifact, runtime, threads=threads, precision=precision)
        version = predictor.version
        result = parity(artifact, predictor, read_probes(artifact))
        number = None if artifact.manifest.precision == "float32" else len(integer_kernels(predictor))
    except (ArtifactError, InputError) as error:
        return Checked(runtime=runtime, precision=precision, version=version, error=str(error))
    return Checked(runtime=runtime, precision=precision, version=version, parity=result, integer_kernels=number)
