"""The documents model written as an artifact, as it is or rounded to INT8."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import trilevel
from trilevel.applications.documents.artifact import INT8, graph_inputs
from trilevel.applications.documents.builtin import builtin_document, builtin_pieces
from trilevel.applications.documents.checkpoint import CHECKPOINT_FOLDER, ENCODER_FOLDER, MINILM, PRETRAINED, load_run
from trilevel.applications.documents.data import DocumentBatch, collate
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.graph import ScoringGraph
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.summary import DEFAULT_BUDGET_WORDS
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import FEATURE_SIZES, split_units
from trilevel.artifact.export.artifact import Graph, export_artifact
from trilevel.artifact.manifest import Artifact, read_artifact
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.data.documents import Document
from trilevel.data.places import cache_dir
from trilevel.errors import ArtifactError, InputError
from trilevel.model.checkpoint import weights_sha256
from trilevel.model.folder import CONFIG_FILE

CALIBRATION_TOKENS = 8_192
"""Of a document, at most."""
FLOAT_INPUTS = "encoder.stack.blocks.*.ffn"
"""Of a pretrained encoder: their weights alone are rounded (decision 0020)."""
AXES: dict[str, tuple[int | str, ...]] = {
    "input_ids": ("batch", "tokens"),
    "token_prior": ("batch", "tokens"),
    "unit_ends": ("batch", "units"),
    "unit_features": ("batch", "units", len(FEATURE_SIZES)),
    "unit_prior": ("batch", "units"),
    "scores": ("batch", "units"),
}
# tokens of the documents of each probe, at most; the longest unit may take more
PROBES = (
    *((233, 131), (1,), (17,), (33,), (64,), (65,), (128,), (129, 40, 250)),
    *((300,), (350, 90), (257,), (400,), (290, 410), (700,), (1_300,), (2_048,)),
)
_PIECE_TOKENS = 450


def export(
    source: str | Path | None,
    out: str | Path,
    *,
    target: str,
    calibration: Sequence[Document] | None,
    tell: Callable[[str], None],
) -> Artifact:
    """See `artifact.export_documents`."""
    folder = PRETRAINED if source is None else Path(source)
    model, tokenizer = load_run(folder)
    model = model.float()
    if calibration is not None:
        tell(f"measuring the ranges of activations on {len(calibration)} documents")
        model = to_int8(model, [encode(split_units(one), tokenizer) for one in calibration], target=target)
    assert model.encoder is not None
    graph = Graph(
        task="documents",
        name="documents" if source is None else folder.name,
        module=ScoringGraph(model).eval(),
        calls=probe_calls(tokenizer),
        axes=AXES,
        output="scores",
        settings={
            "max_tokens": model.config.max_tokens,
            "budget_words": DEFAULT_BUDGET_WORDS,
            "weights_sha256": weights_sha256(folder / CHECKPOINT_FOLDER),
            "calibration_documents": None if calibration is None else len(calibration),
        },
        levels={"tokens": model.encoder.config.to_dict()["levels"], "units": model.config.to_dict()["unit_levels"]},
        tokenizer=tokenizer.to_str(),
        about=(
            f"Scores the sentences of documents of up to {model.config.max_tokens:,} tokens, for extractive summaries. "
            "All of them pass the deep layers: the graph has no focus."
        ),
    )
    return export_artifact(graph, out, target=target, tell=tell)


def shipped_artifact(backbone: str, tell: Callable[[str], None], *, target: str = "portable") -> Artifact:
    """The shipped summariser in INT8: `scratch`, as it comes, or `minilm`, made once and kept in the cache.

    Of the targets `native` is made of both, and kept.

    Raises:
        CheckpointError: MiniLM cannot be had.
        ArtifactError: the cache cannot be written, or no runtime answers as torch does.
    """
    is_scratch = backbone == "scratch"
    if is_scratch and target == "portable":
        return read_artifact(INT8)
    source = PRETRAINED if is_scratch else MINILM
    digest = hashlib.sha256(f"{trilevel.__version__} {weights_sha256(source / CHECKPOINT_FOLDER)}".encode())
    if not is_scratch:
        digest.update((MINILM / ENCODER_FOLDER / CONFIG_FILE).read_bytes())
    digest.update(b"" if target == "portable" else target.encode())
    kept = cache_dir() / "artifacts" / digest.hexdigest()[:32]
    if kept.exists():
        try:
            return read_artifact(kept)
        except ArtifactError as error:
            tell(f"{kept} is damaged and made again ({error})")
            shutil.rmtree(kept)
    tell(f"making the artifact, once; it is kept in {kept}")
    return export(None if is_scratch else MINILM, kept, target=target, calibration=builtin_pieces(), tell=tell)


def to_int8(model: DocumentModel, documents: Sequence[Encoded], *, target: str = "portable") -> DocumentModel:
    """The model with integer weights and activations, ranges measured on documents one by one; no training."""
    if not documents:
        raise InputError("no documents to measure ranges on; give some, or builtin_pieces() of documents.builtin.")
    config = _with_float_parts(QuantizeConfig(activations="uint8" if target == "cpu" else "int8"), model)
    batches = [collate([document.cut(CALIBRATION_TOKENS)]) for document in documents]
    rounded = freeze(quantize(model, config, batches, _run))
    assert isinstance(rounded, DocumentModel)
    return rounded.eval()


def _with_float_parts(config: QuantizeConfig, model: DocumentModel) -> QuantizeConfig:
    """Of a model on a pretrained encoder some parts are computed in float (decision 0020)."""
    if model.unit_input is None or model.encoder is None:
        return config
    return dataclasses.replace(
        config, skip=("units", "unit_input.map", "unit_input.word_map"), float_inputs=(FLOAT_INPUTS,)
    )


def _run(model: torch.nn.Module, batch: DocumentBatch) -> Tensor:
    scores: Tensor = model(batch)
    return scores


def probe_calls(tokenizer: DocumentTokenizer) -> list[dict[str, Tensor]]:
    """Probes of built-in text: pieces by turns, the long ones of the whole document."""
    whole = encode(split_units(builtin_document()), tokenizer)
    pieces = [encode(split_units(piece), tokenizer) for piece in builtin_pieces()]
    calls, number = [], 0
    for lengths in PROBES:
        documents = []
        for tokens in lengths:
            documents.append((whole if tokens > _PIECE_TOKENS else pieces[number % len(pieces)]).cut(tokens))
            number += 1
        calls.append({name: torch.from_numpy(array) for name, array in graph_inputs(documents).items()})
    return calls
