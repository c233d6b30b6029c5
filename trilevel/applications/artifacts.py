"""Artifacts of every application: written from whatever was trained, and loaded to predict; loading needs no torch."""

from __future__ import annotations

import importlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trilevel.artifact.audited import AuditedPredictor
from trilevel.artifact.check import check_runtimes, default_runtime
from trilevel.artifact.explain import Explanation, Recorder
from trilevel.artifact.manifest import Artifact, Manifest, check_free, read_artifact, write_artifact
from trilevel.artifact.path_probes import check_path_probes
from trilevel.artifact.routed import RoutedPredictor, has_paths, read_latency
from trilevel.artifact.runtime.predictor import Precision, Predictor, Runtime, load_predictor
from trilevel.artifact.verify import Parity, check_probes
from trilevel.errors import ArtifactError, ConfigError, TrilevelError

_LOG = logging.getLogger(__name__)
SHIPPED = "documents"
"""The name of the summariser that ships, where a model is asked for."""
# the module of a task, what exports and what predicts
_PARTS = {
    "images": ("trilevel.applications.images.artifact", "export_images", "ImagePredictor"),
    "classification": (
        "trilevel.applications.classification.artifact",
        "export_classification",
        "ClassificationPredictor",
    ),
    "embedding": ("trilevel.applications.embedding.artifact", "export_embedding", "EmbeddingPredictor"),
    "documents": ("trilevel.applications.documents.artifact", "export_documents", "DocumentPredictor"),
}


class Model:
    """An artifact that is open in a runtime.

    Attributes:
        artifact: where it is and which files it has.
        manifest: what it says of itself.
        runtime: the name of the one that computes; which one is chosen is never hidden.
        version: of the runtime.
        precision: of what is not quantized.
        parity: how its answers to the probes differed from those expected.
        task: the object that makes inputs of texts or images, and records of outputs.
    """

    def __init__(self, artifact: Artifact, predictor: Predictor, parity: Parity) -> None:
        self.artifact, self.manifest = artifact, artifact.manifest
        self.runtime, self.version, self.precision = predictor.runtime, predictor.version, predictor.precision
        self.parity, self.task = parity, open_task(artifact, predictor)

    def predict(self, inputs: Sequence[Any]) -> Any:
        """What the application's own `predict` gives: labels with their softmax, vectors, summaries.

        Raises:
            InputError: an input cannot be used.
        """
        return self.task.predict(inputs)

    def __repr__(self) -> str:
        manifest = self.manifest
        return f"<{manifest.task} {manifest.name!r}, {manifest.precision}, in {self.runtime} {self.version}>"


def load(
    folder: str | Path,
    *,
    runtime: Runtime | None = None,
    threads: int | None = None,
    precision: Precision = "float32",
    audit: str | Path | None = None,
) -> Model:
    """Open an artifact: hashes are compared, then the answers to its probes.

        >>> model = load("artifact")  # doctest: +SKIP
        >>> model.predict(["a fine film"])  # doctest: +SKIP

    Args:
        folder: that `trilevel export` wrote.
        runtime: `openvino`, `onnxruntime` or `torch`, without a fallback; None takes OpenVINO on x86 where it is
            installed, else ONNX Runtime. The result's `runtime` says which.
        threads: that a call may use; None for one a core.
        precision: of what is not quantized; `bfloat16` in OpenVINO alone.
        audit: file in which an artifact with paths keeps what it saw of its own answers: 2% are compared with the full
            path's, and where too many differ it takes that alone; None for no audit.

    Inputs of an artifact with paths (`trilevel route`) take a path each, as its certificate says. On another platform
    than the certificate's all take the full path; a warning in the log says why.

    Raises:
        ArtifactError: there is no artifact; it is damaged or of another version; or the runtime gives other answers.
        CertificateError: its certificate was edited, or is of another model.
        MissingExtraError: the runtime is not installed.
        ConfigError: an option is out of range.
    """
    artifact = read_artifact(folder)
    runtime = runtime or default_runtime(artifact)
    if not has_paths(artifact):
        if audit is not None:
            raise ConfigError(f"{folder} has one path, so there is nothing to audit; leave audit out.")
        predictor = load_predictor(artifact, runtime, threads=threads, precision=precision)
        return Model(artifact, predictor, check_probes(artifact, predictor))
    routed = RoutedPredictor(artifact, runtime, threads=threads, precision=precision)
    parity = check_probes(artifact, routed.whole)
    check_path_probes(artifact, routed.steps)
    if routed.reason:
        _LOG.warning("%s: %s", artifact.path, routed.reason)
    return Model(artifact, routed if audit is None else AuditedPredictor(routed, audit), parity)


def explained(
    folder: str | Path, inputs: Sequence[str], *, runtime: Runtime, threads: int | None = None
) -> Iterator[tuple[str, str, Explanation]]:
    """Name, label and path of each input, one after another.

    Args:
        folder: artifact with paths.
        inputs: texts or files, as the application takes them.
        runtime, threads: see `load`.

    Raises:
        ArtifactError: the artifact has no paths, or all inputs take the full path here; it says why.
        InputError: an input cannot be used.
    """
    artifact = read_artifact(folder)
    recorder = Recorder(RoutedPredictor(artifact, runtime, threads=threads), read_latency(artifact))
    task = open_task(artifact, recorder)
    is_text = artifact.manifest.task == "documents"
    for given in inputs:
        (prediction,) = task.predict([Path(given) if is_text and Path(given).is_file() else given])
        if recorder.found:
            said = f"{len(prediction.indices)} sentences" if is_text else str(prediction.label)
            yield given, said, recorder.found.pop()


def open_task(artifact: Artifact, predictor: Predictor) -> Any:
    """What the application of an artifact predicts with.

    Raises:
        ArtifactError: the task is unknown, or the settings are none of it.
    """
    module, _, name = _parts(artifact.manifest)
    predictor_class = getattr(importlib.import_module(module), name)
    try:
        return predictor_class(artifact, predictor)
    except TrilevelError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.path}: its settings are none of {artifact.manifest.task} ({error!r}). Export the model again."
        ) from error


def export(
    source: str | Path,
    out: str | Path,
    *,
    target: str = "portable",
    backbone: str | None = None,
    runtimes: Sequence[Runtime] = (),
    tell: Callable[[str], None] = lambda _what: None,
) -> Artifact:
    """Write the model of a folder as an artifact.

    Args:
        source: a folder that `trilevel train`, `convert` or `compress` wrote, what `load_source` takes, or `documents`:
            the summariser that ships, in INT8.
        out: folder; an artifact there is replaced when the new one is whole.
        target: `portable`, which every runtime takes; `cpu`, for unsigned activations as well; `native`, attention as
            one operator of trilevel's kernels, faster and for ONNX Runtime alone.
        backbone: of that summariser, `scratch` (None as well) or `minilm`, which is made once and kept in the cache.
        runtimes: that must give torch's answers; without, one that is installed must.
        tell: told what is being done.

    Raises:
        ArtifactError: `out` is something else or cannot be written, or the answers are not torch's.
        CheckpointError, ConfigError, InputError, MissingExtraError: the model cannot be read or exported.
    """
    from trilevel.applications.kinds import model_kind

    check_free(Path(out))
    if backbone is not None or (str(source) == SHIPPED and not Path(SHIPPED).exists()):
        return _export_shipped(source, out, target, backbone or "scratch", runtimes, tell)
    module, name, _ = _PARTS[model_kind(source)]
    export_task = getattr(importlib.import_module(module), name)
    if not runtimes:
        artifact: Artifact = export_task(source, out, target=target, tell=tell)
        return artifact
    with tempfile.TemporaryDirectory(prefix="trilevel-export-") as folder:
        draft: Artifact = export_task(source, Path(folder) / "artifact", target=target, tell=tell)
        return _copy_checked(draft, out, runtimes, tell)


def _export_shipped(
    source: str | Path,
    out: str | Path,
    target: str,
    backbone: str,
    runtimes: Sequence[Runtime],
    tell: Callable[[str], None],
) -> Artifact:
    if str(source) != SHIPPED or target == "cpu":
        raise ConfigError(
            f"--backbone is of the summariser that ships, which is portable or native: trilevel export {SHIPPED} OUT "
            f"--backbone {backbone}; {source} with target={target!r} was given."
        )
    from trilevel.applications.documents.export import shipped_artifact

    return _copy_checked(shipped_artifact(backbone, tell, target=target), out, runtimes, tell)


def _copy_checked(
    draft: Artifact, out: str | Path, runtimes: Sequence[Runtime], tell: Callable[[str], None]
) -> Artifact:
    """Copy an artifact, if each of the runtimes gives torch's answers."""
    wrong = [one for one in check_runtimes(draft, runtimes, tell=tell) if not one.holds]
    if wrong:
        said = "; ".join(f"{one.runtime}: {one.said}" for one in wrong)
        raise ArtifactError(f"{out} was not written, as the answers are not torch's: {said}.")
    files = {name: partial(shutil.copyfile, draft.file(name)) for name in draft.hashes}
    return write_artifact(out, draft.manifest, files)


def _parts(manifest: Manifest) -> tuple[str, str, str]:
    if manifest.task not in _PARTS:
        raise ArtifactError(
            f"the artifact {manifest.name!r} is for {manifest.task!r}; this trilevel knows {', '.join(_PARTS)}. Use "
            f"trilevel {manifest.trilevel}, which wrote it."
        )
    return _PARTS[manifest.task]
