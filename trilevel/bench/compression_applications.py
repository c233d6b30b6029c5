"""What compression makes of the applications: bytes, time and quality of artifacts beside dense float32 in torch.

The models are those of `scripts/chains.py`: for each application a folder with `dense`, a run, and `seed-0`, `seed-1`
and so on, artifacts; `native-0` is the first of them with attention by the native kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trilevel.applications.artifacts import open_task
from trilevel.applications.documents.artifact import graph_inputs
from trilevel.applications.documents.builtin import builtin_document
from trilevel.applications.documents.checkpoint import load_run as load_document_run
from trilevel.applications.documents.encoded import encode
from trilevel.applications.documents.evaluate import KEPT_RUNS, TECH, Case, evaluate, prepare, systems
from trilevel.applications.documents.select import Selection
from trilevel.applications.documents.summarize import score_units
from trilevel.applications.documents.summary import DEFAULT_BUDGET_WORDS, choose_units
from trilevel.applications.documents.units import split_units
from trilevel.applications.images.checkpoint import CHECKPOINT_FOLDER
from trilevel.applications.images.checkpoint import Run as ImageRun
from trilevel.applications.images.checkpoint import load_run as load_image_run
from trilevel.applications.images.evaluate import held_out
from trilevel.applications.images.score import logits_of
from trilevel.artifact.manifest import MODEL_FILE, Artifact, is_artifact, read_artifact
from trilevel.artifact.runtime.predictor import Runtime, load_predictor
from trilevel.bench.harness import Bar, interleave
from trilevel.errors import InputError
from trilevel.model import checkpoint

if TYPE_CHECKING:
    from rich.table import Table

MODELS = KEPT_RUNS.parent
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
NATIVE = "onnxruntime_native"
"""ONNX Runtime with attention by the native kernels."""
WAYS = (*RUNTIMES, NATIVE)
TORCH = "dense float32 in torch"
TOKENS = 512
"""Of the document that is timed."""
_IMAGES_AT_ONCE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One application.

    Attributes:
        tokens: of the input that is timed, one at a time.
        dense_bytes: of the dense model's weights.
        artifact_bytes: of the graph with its weights, for each seed.
        metric: `accuracy` or `rouge1`, on the test split.
        dense_quality: of the dense model; None where the data is missing.
        qualities: of each artifact.
        ms: medians of the dense model and of the first artifact in each of `WAYS` that was measured, run in turn.
    """

    tokens: int
    dense_bytes: int
    artifact_bytes: list[int]
    metric: str
    dense_quality: float | None
    qualities: list[float]
    ms: dict[str, float]

    @property
    def size_ratio(self) -> float:
        """Bytes of an artifact, mean of the seeds, over those of the dense model."""
        return mean(self.artifact_bytes) / self.dense_bytes

    @property
    def fastest(self) -> str:
        """The way that takes least time."""
        return min((way for way in WAYS if way in self.ms), key=lambda way: self.ms[way])

    @property
    def speed(self) -> float:
        """Time of the dense model over that of the artifact in the fastest way."""
        return self.ms[TORCH] / self.ms[self.fastest]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The dense model, then each seed; the first is the one that is timed."""
        common = {"application": name, "tokens": self.tokens}
        dense = {**common, "model": TORCH, "bytes": self.dense_bytes, self.metric: self.dense_quality}
        found = [dense | {"median_ms": self.ms[TORCH]}]
        for seed, size in enumerate(self.artifact_bytes):
            row = {**common, "model": f"INT8 artifact, seed {seed}", "bytes": size}
            row[self.metric] = self.qualities[seed] if self.qualities else None
            found.append(
                row | ({f"{one}_median_ms": self.ms[one] for one in WAYS if one in self.ms} if seed == 0 else {})
            )
        return found


def measure(models: Path, budget_s: float, tell: Callable[[str], None]) -> dict[str, Application]:
    """The applications whose models are in `models`, each timed for `budget_s` seconds."""
    known = {"images": _images, "documents": _documents}
    found = {}
    for name, measure_one in known.items():
        folders = sorted((models / name).glob("seed-*"))
        if folders and (models / name / "dense").is_dir():
            artifacts = [read_artifact(folder) for folder in folders]
            found[name] = measure_one(models / name / "dense", artifacts, budget_s, tell)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """Quality of the dense model, and of an artifact by what its application predicts with."""

    dense: Callable[[], float]
    artifact: Callable[[Any], float]


def _images(dense: Path, artifacts: Sequence[Artifact], budget_s: float, tell: Callable[[str], None]) -> Application:
    run = load_image_run(dense)
    patches = run.model.config.patches
    shape = (1, patches.num_channels, *patches.image_size)
    one = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels = torch.from_numpy(one)
    judge = None
    try:
        judge = _judge_of_images(run)
    except InputError as error:
        tell(f"images: quality is not measured ({error})")
    dense_quality, qualities = _judged("images", judge, artifacts, tell)
    return Application(
        tokens=patches.num_tokens,
        metric="accuracy",
        dense_quality=dense_quality,
        qualities=qualities,
        ms=_timed("images", lambda: run.model(pixels), artifacts[0], {"pixels": one}, budget_s, tell),
        **_bytes(dense, artifacts),
    )


def _judge_of_images(run: ImageRun) -> _Judge:
    images = held_out(run)
    truth = np.array([run.labels.index(label) for label in images.labels])[images.classes]

    def accuracy(scores: np.ndarray) -> float:
        return float((scores.argmax(-1) == truth).mean())

    def of_artifact(task: Any) -> float:
        parts = np.split(images.pixels, range(_IMAGES_AT_ONCE, len(truth), _IMAGES_AT_ONCE))
        return accuracy(np.concatenate([task.classify(part) for part in parts]))

    return _Judge(dense=lambda: accuracy(logits_of(run.model, images.pixels).numpy()), artifact=of_artifact)


def _documents(dense: Path, artifacts: Sequence[Artifact], budget_s: float, tell: Callable[[str], None]) -> Application:
    model, tokenizer = load_document_run(dense)
    document = encode(split_units(builtin_document()), tokenizer).cut(TOKENS)
    data, judge = os.environ.get("TRILEVEL_DATA"), None
    if data is None:
        tell("documents: quality is not measured (set TRILEVEL_DATA to the folder of the data sets)")
    else:
        judge = _judge_of_documents(dense, Path(data) / TECH)
    dense_quality, qualities = _judged("documents", judge, artifacts, tell)
    inputs = graph_inputs([document])
    return Application(
        tokens=document.num_tokens,
        metric="rouge1",
        dense_quality=dense_quality,
        qualities=qualities,
        ms=_timed("documents", lambda: score_units(model, document), artifacts[0], inputs, budget_s, tell),
        **_bytes(dense, artifacts),
    )


def _judge_of_documents(dense: Path, data: Path) -> _Judge:
    cases, selection = prepare(data), Selection(words=DEFAULT_BUDGET_WORDS)

    def rouge1(choose: Callable[[Case], list[int]]) -> float:
        return float(evaluate(cases, {"it": choose})["it"].scores[:, 0].mean())

    def of_artifact(task: Any) -> float:
        return rouge1(lambda case: choose_units(case.units, task.score(case.encoded), case.encoded, selection))

    return _Judge(dense=lambda: rouge1(systems({"dense": dense})["dense"]), artifact=of_artifact)


def _judged(
    name: str, judge: _Judge | None, artifacts: Sequence[Artifact], tell: Callable[[str], None]
) -> tuple[float | None, list[float]]:
    """Quality of the dense model and of each artifact; None and nothing without a judge."""
    if judge is None:
        return None, []
    tell(f"{name}: quality of the dense model")
    dense_quality, qualities = judge.dense(), []
    for artifact in artifacts:
        tell(f"{name}: quality of {artifact.path.name}")
        predictor = load_predictor(artifact, RUNTIMES[0], threads=torch.get_num_threads())
        qualities.append(judge.artifact(open_task(artifact, predictor)))
    return dense_quality, qualities


def _bytes(dense: Path, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    return {
        "dense_bytes": (dense / CHECKPOINT_FOLDER / checkpoint.MODEL_FILE).stat().st_size,
        "artifact_bytes": [artifact.bytes_of(MODEL_FILE) for artifact in artifacts],
    }


def _timed(
    name: str,
    dense: Callable[[], object],
    artifact: Artifact,
    inputs: Mapping[str, np.ndarray],
    budget_s: float,
    tell: Callable[[str], None],
) -> dict[str, float]:
    tell(f"{name}: timing")

    def in_torch() -> None:
        with torch.inference_mode():
            dense()

    runs: dict[str, Callable[[], object]] = {TORCH: in_torch}
    for runtime in RUNTIMES:
        predictor = load_predictor(artifact, runtime, threads=torch.get_num_threads())
        runs[runtime] = lambda own=predictor: own.run(inputs)  # type: ignore[misc]
    native = artifact.path.with_name(artifact.path.name.replace("seed", "native"))
    if is_artifact(native):
        kernels = load_predictor(read_artifact(native), "onnxruntime", threads=torch.get_num_threads())
        runs[NATIVE] = lambda: kernels.run(inputs)
    timings = interleave(runs, budget_s=budget_s, min_repeats=15, max_repeats=500, warm_up=3)
    return {own: timing.median_ms for own, timing in timings.items()}


def bars(found: Mapping[str, Application]) -> list[Bar]:
    """What issue 5 promises of the applications; what was not measured does not hold."""

    def of(name: str, value: Callable[[Application], float | None]) -> float | None:
        return value(found[name]) if name in found else None

    return [
        Bar(name="size_ratio_images", value=of("images", lambda own: own.size_ratio), op="<=", bar=0.10),
        Bar(name="size_ratio_documents", value=of("documents", lambda own: own.size_ratio), op="<=", bar=0.15),
        Bar(name="speed_images", value=of("images", lambda own: own.speed), op=">=", bar=6),
        Bar(name="speed_documents_512", value=of("documents", lambda own: own.speed), op=">=", bar=6),
        Bar(name="images_points_lost", value=of("images", _points_lost), op="<=", bar=1.0),
        Bar(name="documents_rouge1_vs_dense", value=of("documents", _kept), op=">=", bar=0.99),
    ]


def _points_lost(own: Application) -> float | None:
    return None if own.dense_quality is None else 100 * (own.dense_quality - mean(own.qualities))


def _kept(own: Application) -> float | None:
    return None if own.dense_quality is None else mean(own.qualities) / own.dense_quality


def applications_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes, milliseconds and quality of the dense models and of the artifacts, seed by seed."""
    from rich.table import Table

    table = Table(title="applications: dense float32 in torch, and INT8 artifacts", title_justify="left")
    words, numbers = ("application", "model"), ("tokens", "bytes", "accuracy", "rouge1")
    times = ("median_ms", *(f"{one}_median_ms" for one in WAYS))
    for column in (*words, *numbers, *times):
        table.add_column(column.replace("_", " "), justify="left" if column in words else "right")
    for row in rows:
        cells = [str(row[column]) for column in words]
        for column in (*numbers, *times):
            value = row.get(column)
            cells.append("" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        table.add_row(*cells)
    return table
