"""The whole chain on long documents: levels, focus, paths and INT8 beside the dense model that it was made of."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from trilevel.applications.documents.artifact import DocumentPredictor, graph_inputs
from trilevel.applications.documents.builtin import builtin_document, builtin_pieces
from trilevel.applications.documents.checkpoint import CHECKPOINT_FOLDER, MINILM, load_run
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.export import AXES, probe_calls, to_int8
from trilevel.applications.documents.graph import ScoringGraph
from trilevel.applications.documents.measure import Job, Measured, measure, save_encoded
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.summarize import score_units
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.artifact.export.artifact import example_of
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.manifest import Artifact
from trilevel.artifact.routed import RoutedPredictor
from trilevel.artifact.runtime.openvino import openvino_core
from trilevel.bench.harness import Bar, interleave
from trilevel.data.documents import Document, load_jsonl
from trilevel.errors import InputError
from trilevel.model.checkpoint import weights_sha256

TOKENS, WORDS = 8_192, 10_000
DENSE_TORCH, DENSE_OPENVINO, OURS = "dense, torch float32", "dense INT8, OpenVINO", "trilevel, paths and focus"
Tell = Callable[[str], None]


def chain_8k(
    artifact: Artifact,
    predictor: RoutedPredictor,
    data: Path,
    *,
    documents: int,
    budget_s: float,
    work: Path,
    tell: Tell,
) -> dict[str, Any]:
    """Milliseconds of a document of 8,192 tokens, mean of several: dense in torch, dense INT8 in OpenVINO, and routed.

    Args:
        artifact: routed, of the summariser on MiniLM that ships.
        predictor: that runs it.
        data: documents, whose test split is joined by source.
        documents: how many.
        budget_s: of timing each of them.
        work: folder where the dense graph is kept.
        tell: told what is done.

    Raises:
        InputError: the artifact is of another model, or the data has too few documents.
    """
    if artifact.manifest.settings.get("weights_sha256") != weights_sha256(MINILM / CHECKPOINT_FOLDER):
        raise InputError(
            f"{artifact.path} is not of the summariser on MiniLM that ships, whose dense original is known."
        )
    levels, tokenizer = load_run(MINILM)
    dense = levels.dense().eval()
    graph = _dense_openvino(dense, tokenizer, work, tell)
    task = DocumentPredictor(artifact, predictor)
    rows: list[dict[str, Any]] = []
    for number, encoded in enumerate(joined(data, tokenizer, documents)):
        tell(f"8,192 tokens, document {number + 1} of {documents}")
        inputs = graph_inputs([encoded])
        # how far the dense graph in 8 bits is from the dense model is its own affair; that it runs the model is not
        error = _difference(graph(inputs), score_units(dense, encoded))
        if error > 0.2:
            raise InputError(f"the dense graph answers otherwise than the dense model, by {error:.2f} of its scores.")
        runs: dict[str, Callable[[], object]] = {
            DENSE_TORCH: lambda own=encoded: score_units(dense, own),  # type: ignore[misc]
            DENSE_OPENVINO: lambda own=inputs: graph(own),  # type: ignore[misc]
            OURS: lambda own=encoded: task.score(own),  # type: ignore[misc]
        }
        timings = interleave(runs, budget_s=budget_s, min_repeats=2, max_repeats=9)
        (routed,) = predictor.route(inputs)
        rows.append(
            {name: timing.median_ms for name, timing in timings.items()}
            | {"tokens": encoded.num_tokens, "path": routed.path}
        )
    means = {name: fmean(row[name] for row in rows) for name in (DENSE_TORCH, DENSE_OPENVINO, OURS)}
    return {
        "documents": rows,
        "ms": means,
        "vs_torch_fp32": means[DENSE_TORCH] / means[OURS],
        "vs_openvino_int8": means[DENSE_OPENVINO] / means[OURS],
    }


def joined(data: Path, tokenizer: DocumentTokenizer, count: int) -> list[Encoded]:
    """Test documents of one source each, joined and cut to 8,192 tokens.

    Raises:
        InputError: there are not so many.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    found: list[Encoded] = []
    for document in load_jsonl(data, split="test"):
        own = texts[document.source]
        own.append(document.text)
        encoded = encode(split_units(Document(id="", title="", text="\n".join(own))), tokenizer)
        if encoded.num_tokens >= TOKENS:
            found.append(encoded.cut(TOKENS))
            own.clear()
        if len(found) == count:
            return found
    raise InputError(f"{data}: the test documents make {len(found)} of {TOKENS:,} tokens, {count} are needed.")


def _dense_openvino(
    dense: DocumentModel, tokenizer: DocumentTokenizer, work: Path, tell: Tell
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """The dense model in 8 bits, rounded as ours is, in OpenVINO."""
    path = work / "dense-int8.onnx"
    if not path.exists():
        tell("quantizing and exporting the dense summariser")
        rounded = to_int8(dense, [encode(split_units(piece), tokenizer) for piece in builtin_pieces()])
        draft = path.with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        example = dict(example_of(probe_calls(tokenizer)))
        export_onnx(ScoringGraph(rounded).eval(), example, AXES, draft, output="scores")
        draft.replace(path)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core = openvino_core()
    model = core.compile_model(core.read_model(str(path)), "CPU", options)
    request = model.create_infer_request()
    return lambda inputs: next(iter(request.infer(inputs).values()))[0].copy()


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def summarize_10k(threads: int, tell: Tell) -> dict[str, Any]:
    """Seconds and peak bytes of the shipped INT8 artifact on 10,000 words, in a process of its own, beside dense.

    The dense ones have the same weights in float32: SDPA, which holds no matrix of scores, and attention that does.
    """
    _, tokenizer = load_run(None)
    document = builtin_document()
    units = split_units(document)
    while sum(unit.words for unit in units) < WORDS:
        document = replace(document, text=f"{document.text}\n{builtin_document().text}")
        units = split_units(document)
    last = int(np.searchsorted(np.cumsum([unit.words for unit in units]), WORDS)) + 1
    encoded = encode(units[:last], tokenizer)
    found: dict[str, Measured] = {}
    handle, name = tempfile.mkstemp(suffix=".npz")
    os.close(handle)
    try:
        save_encoded(Path(name), encoded)
        for attention in ("int8", "sdpa", "materialised"):
            tell(f"10,000 words: {attention}")
            job = Job(
                attention=attention,
                document=name,
                model=None,
                max_tokens=encoded.num_tokens,
                threads=threads,
            )
            found[attention] = measure(job)
    finally:
        Path(name).unlink()
    ours, dense = found["int8"].median_s, found["sdpa"].median_s
    return {
        "tokens": encoded.num_tokens,
        "words": sum(unit.words for unit in units[:last]),
        "seconds": {name: one.median_s for name, one in found.items()},
        "peak_bytes": {name: one.peak_memory_bytes for name, one in found.items()},
        "stopped": {name: one.stopped for name, one in found.items() if one.stopped},
        "vs_dense": None if ours is None or dense is None else dense / ours,
    }


def chain_bars(chain: dict[str, Any] | None, summary: dict[str, Any] | None) -> Sequence[Bar]:
    """What issue 6 promises of whole chains; what was not measured does not hold."""
    chain, summary = chain or {}, summary or {}
    seconds, peaks = summary.get("seconds", {}), summary.get("peak_bytes", {})
    return [
        Bar(name="chain_8k_vs_torch_fp32", value=chain.get("vs_torch_fp32"), op=">=", bar=40),
        Bar(name="chain_8k_vs_openvino_int8", value=chain.get("vs_openvino_int8"), op=">=", bar=20),
        Bar(name="summarize_10k_s", value=seconds.get("int8"), op="<", bar=1),
        Bar(name="summarize_10k_peak_bytes", value=peaks.get("int8"), op="<", bar=5e8),
        Bar(name="summarize_10k_vs_dense", value=summary.get("vs_dense"), op=">=", bar=10),
    ]
