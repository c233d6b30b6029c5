"""The cheap paths of a summariser on a pretrained encoder: heads behind its blocks, focus, INT8.

The encoder stays as it is. Each head begins as the run's own part over units and learns from the documents of the
training what the blocks before it say of the units; behind the first segment it sees the units that go on, as it will.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trilevel.applications.documents.artifact import graph_inputs
from trilevel.applications.documents.backbone import Backbone
from trilevel.applications.documents.checkpoint import CHECKPOINT_FOLDER, load_run
from trilevel.applications.documents.data import DocumentBatches, encode_corpus
from trilevel.applications.documents.encoded import Encoded
from trilevel.applications.documents.export import AXES, CALIBRATION_TOKENS, FLOAT_INPUTS, probe_calls
from trilevel.applications.documents.graph import mean_between
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.objective import objective
from trilevel.applications.documents.segments import SCORES, WORDS, DocumentPaths, Seen
from trilevel.artifact.export.artifact import example_of
from trilevel.artifact.export.segments import Piece
from trilevel.artifact.platform import has_integer_products
from trilevel.artifact.probe import Probe
from trilevel.artifact.runtime.focus import HIDDEN, KEPT
from trilevel.compression.exits import ExitsConfig
from trilevel.compression.plan import CompressionPlan, Recovery, Stage
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.compression.written import read_json, write_bytes, write_json
from trilevel.data.documents import load_jsonl
from trilevel.data.places import data_path
from trilevel.errors import ConfigError, InputError
from trilevel.model.checkpoint import weights_sha256
from trilevel.model.config import from_mapping
from trilevel.training.config import TrainConfig
from trilevel.training.loop import fit

FOCUS = 0.2
CALIBRATION_DOCUMENTS = 32
Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The table `data` of a plan: documents of the training that heads learn from, cut to `max_tokens`; batches."""

    documents: int = 600
    max_tokens: int = 4_096
    max_batch_tokens: int = 20_480
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentOrigin:
    """Where the documents of the training lie; the file names its splits, so that no share of it is held out."""

    path: str
    valid_fraction: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentFamily:
    """What the artifact's family is made of.

    Attributes:
        key: SHA-256 of all that decides it.
        name: of the family.
        pieces: its segments.
        example: what they are traced with.
        axes: of all that they read and give.
        probes: what torch answers behind each.
        settings: for the manifest.
        origin: see there.
    """

    key: str
    name: str
    pieces: Sequence[Piece]
    example: dict[str, torch.Tensor]
    axes: dict[str, tuple[int | str, ...]]
    probes: Sequence[Probe]
    settings: dict[str, Any]
    origin: DocumentOrigin


def default_plan(num_layers: int = 6) -> CompressionPlan:
    """Heads behind a sixth, half and all of the blocks, a fifth of the tokens behind the first; INT8 if faster."""
    exits = ExitsConfig(after=(max(1, num_layers // 6), max(2, num_layers // 2)), focus=FOCUS)
    train = TrainConfig(steps=1, learning_rate=5e-4, weight_decay=0.05, final_fraction=0.02, checkpoint_every=60)
    stages = (Stage(name="exits", config=exits, recovery=Recovery(steps=240, warmup_fraction=0.1, train=train)),)
    return CompressionPlan(
        stages=(*stages, Stage(name="quantize", config=QuantizeConfig())) if has_integer_products() else stages
    )


def make_document_family(
    source: str | Path,
    data: str | Path | None,
    plan: CompressionPlan | None,
    work: Path,
    *,
    seed: int,
    limit: int | None,
    progress: Progress,
    show_progress: bool,
) -> DocumentFamily:
    """Train the heads, or take what is there, and round.

    Args:
        source: run of a summariser on a pretrained encoder.
        data: documents with abstracts; those of the split `train` are learned from.
        plan: with `[exits]`, and `[quantize]` for INT8; None for `default_plan`.
        work: folder of what is kept between calls.
        seed: of training.
        limit: documents to learn from, for a try.
        progress, show_progress: told of what is done.

    Raises:
        ConfigError: the run has an encoder of its own, or the plan is none for summarisers.
        InputError: no document with an abstract to learn from.
        TrainingInterrupted: the user stopped; the same call goes on.
    """
    model, tokenizer = load_run(source)
    backbone, encoder = model.config.tokens, model.encoder
    if not isinstance(backbone, Backbone) or encoder is None:
        raise ConfigError(
            f"{source} has an encoder of its own, of {model.config.tokens.dim} numbers a token: too small for paths to "
            "save anything. Summarisers on a pretrained encoder can be routed (train documents --encoder)."
        )
    if data is None:
        raise InputError("a summariser's run does not say where its documents lie. Name them, in JSONL with splits.")
    num_layers = len(encoder.stack.blocks)
    plan = default_plan(num_layers) if plan is None else plan
    exits, recovery, rounding = _parts(plan)
    settings = from_mapping(DataConfig, {"seed": seed, **plan.data})
    documents = load_jsonl(data_path(data), split="train", limit=limit or settings.documents)
    corpus = [one.cut(settings.max_tokens) for one in encode_corpus(documents, tokenizer)]
    corpus = [one for one in corpus if one.oracle.any()]
    if not corpus:
        raise InputError(f"{data}: no document of the split train has an abstract to learn from.")
    places, fraction = exits.places(num_layers), FOCUS if exits.focus is None else exits.focus
    key = _key(source, documents, replace(plan, stages=plan.stages[:1]), seed, limit)
    heads = [_head_of(model) for _ in range(len(places) + 1)]
    paths = DocumentPaths(encoder, backbone, heads, places, fraction)
    trainer = _Trainer(
        work=work, key=key, config=recovery.config(lambda _epochs: 0, seed), settings=settings, progress=progress,
        show_progress=show_progress,
    )  # fmt: skip
    (seen,) = trainer.vectors(paths, corpus, is_deep=False)
    heads[0] = trainer.head(0, heads[0], seen)
    paths = DocumentPaths(encoder, backbone, heads, places, fraction)
    for segment, seen in enumerate(trainer.vectors(paths, corpus, is_deep=True), start=1):
        heads[segment] = trainer.head(segment, heads[segment], seen)
    paths = DocumentPaths(encoder, backbone, heads, places, fraction).eval()
    made = paths if rounding is None else _rounded(paths, rounding, corpus)
    calls = probe_calls(tokenizer)
    axes: dict[str, tuple[int | str, ...]] = dict(AXES)
    axes |= {HIDDEN: ("batch", "places", backbone.vector_dim), WORDS: ("batch", "units", backbone.word_dim)}
    probes = [
        Probe(
            inputs={name: tensor.numpy() for name, tensor in call.items()},
            outputs={SCORES: torch.stack(made(call), 1).numpy()},
        )
        for call in calls
    ]
    return DocumentFamily(
        key=f"{key} {plan.to_dict()}",
        name=f"{'float32' if rounding is None else 'int8'}/focus={fraction!r}",
        pieces=made.pieces(),
        example=dict(example_of(calls)),
        axes=axes,
        probes=probes,
        settings={"special_tokens": list(paths.around)},
        origin=DocumentOrigin(path=str(data)),
    )


def _parts(plan: CompressionPlan) -> tuple[ExitsConfig, Recovery, QuantizeConfig | None]:
    exits, *others = plan.stages
    rounding = others[0] if others else None
    is_right = exits.name == "exits" and len(others) < 2 and (rounding is None or rounding.name == "quantize")
    if not is_right or (rounding is not None and not rounding.recovery.is_empty):
        raise ConfigError(
            f"the plan has the stages {', '.join(stage.name for stage in plan.stages)}; paths of a summariser need "
            "[exits], and for INT8 [quantize] without [quantize.train]: its encoder stays as it is."
        )
    assert isinstance(exits.config, ExitsConfig)
    if exits.config.layer_dropout:
        raise ConfigError(
            f"layer_dropout={exits.config.layer_dropout} is of classifiers, whose blocks are trained; leave it out."
        )
    if rounding is None:
        return exits.config, exits.recovery, None
    assert isinstance(rounding.config, QuantizeConfig)
    return exits.config, exits.recovery, rounding.config


def _head_of(model: DocumentModel) -> DocumentModel:
    """The part over units, its table of words not to be trained."""
    head = DocumentModel(model.config)
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("encoder.")}
    head.load_state_dict(own)
    if head.unit_input is not None and head.unit_input.words is not None:
        head.unit_input.words.requires_grad_(False)
    return head.eval()


def _key(source: str | Path, documents: Sequence[Any], plan: CompressionPlan, seed: int, limit: int | None) -> str:
    digest = hashlib.sha256(weights_sha256(Path(source) / CHECKPOINT_FOLDER).encode())
    digest.update(repr((plan.to_dict(), seed, limit)).encode())
    for document in documents:
        digest.update(hashlib.sha256(repr((document.title, document.text, document.abstract)).encode()).digest())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trainer:
    work: Path
    key: str
    config: TrainConfig
    settings: DataConfig
    progress: Progress
    show_progress: bool

    def head(self, segment: int, head: DocumentModel, documents: Sequence[Encoded]) -> DocumentModel:
        """A head that has learned from documents with vectors; kept, and gone on with."""
        batches = DocumentBatches(
            documents,
            max_tokens=self.settings.max_tokens,
            max_batch_tokens=self.settings.max_batch_tokens,
            seed=self.settings.seed,
        )
        folder = self.work / f"head-{segment + 1}-{self.key[:12]}"
        learned = copy.deepcopy(head).train()
        fit(
            learned,
            batches,
            objective(focus_weight=0.0),
            config=self.config,
            out_dir=folder,
            model_config=learned.config.to_dict(),
            show_progress=self.show_progress,
        )
        return learned.eval()

    def vectors(self, paths: DocumentPaths, corpus: Sequence[Encoded], *, is_deep: bool) -> list[list[Encoded]]:
        """Documents as the heads see them, by segment: with vectors of their units, or of those that went on."""
        segments = range(1, len(paths.heads)) if is_deep else range(1)
        files = [self.work / f"vectors-{segment + 1}.npz" for segment in segments]
        if not all(file.exists() and read_json(file.with_suffix(".json")) == {"key": self.key} for file in files):
            found: list[list[_Vectors]] = [[] for _ in segments]
            total, done = sum(one.num_tokens for one in corpus), 0
            for one in corpus:
                seen = list(paths.walk(graph_inputs([one]), deepest=None if is_deep else 0))
                for own, segment in zip(found, segments, strict=True):
                    own.append(_vectors(seen[segment]))
                done += one.num_tokens
                self.progress("vectors behind " + ("deeper segments" if is_deep else "the first segment"), done / total)
            for file, own in zip(files, found, strict=True):
                _store(file, own)
                write_json(file.with_suffix(".json"), {"key": self.key})
        return [_restored(file, corpus) for file in files]


_Vectors = tuple[np.ndarray, np.ndarray]
"""Places of the units that a segment saw, and means of their hidden states (units, dim), float16."""


def _vectors(seen: Seen) -> _Vectors:
    ends = torch.from_numpy(seen.arrays["unit_ends"])
    means = mean_between(seen.hidden, torch.nn.functional.pad(ends[:, :-1], (1, 0)), ends)[0].half().numpy()
    kept = seen.arrays[KEPT][0] if KEPT in seen.arrays else np.arange(len(means))
    return kept[kept >= 0], means[kept >= 0]


def _store(path: Path, found: Sequence[_Vectors]) -> None:
    buffer = io.BytesIO()
    kept, vectors = zip(*found, strict=True)
    counts = np.array([len(own) for own in kept])
    np.savez(buffer, vectors=np.concatenate(vectors), kept=np.concatenate(kept), counts=counts)
    write_bytes(path, buffer.getvalue())


def _restored(path: Path, corpus: Sequence[Encoded]) -> list[Encoded]:
    with np.load(path, allow_pickle=False) as stored:
        vectors, kept, counts = stored["vectors"], stored["kept"], stored["counts"]
    ends = np.cumsum(counts)
    return [
        replace(one.only(kept[end - count : end]), unit_vectors=vectors[end - count : end])
        for one, end, count in zip(corpus, ends, counts, strict=True)
    ]


def _rounded(paths: DocumentPaths, config: QuantizeConfig, corpus: Sequence[Encoded]) -> DocumentPaths:
    """In INT8: heads and inputs of feed-forward parts stay float (decision 0020)."""
    config = replace(config, skip=(*config.skip, "heads"), float_inputs=(*config.float_inputs, FLOAT_INPUTS))
    batches = [
        {name: torch.from_numpy(array) for name, array in graph_inputs([one.cut(CALIBRATION_TOKENS)]).items()}
        for one in corpus[:CALIBRATION_DOCUMENTS]
    ]
    rounded = freeze(quantize(paths, config, batches, lambda model, batch: model(batch)))
    assert isinstance(rounded, DocumentPaths)
    return rounded.eval()
