"""Evaluation: ROUGE of every way to summarise on the same whole documents, sentences and budget, and the bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trilevel.applications.documents import baselines
from trilevel.applications.documents.backbone import Backbone, StoredVectors
from trilevel.applications.documents.checkpoint import (
    CHECKPOINT_FOLDER,
    ENCODER_FOLDER,
    MINILM,
    PRETRAINED,
    load_run,
    shipped_tokenizer,
)
from trilevel.applications.documents.data import encode_corpus
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.model import DocumentModel
from trilevel.applications.documents.rouge import bootstrap_mean, bootstrap_ratio, rouge
from trilevel.applications.documents.select import Selection, choose
from trilevel.applications.documents.summarize import score_units, summarize
from trilevel.applications.documents.summary import DEFAULT_BUDGET_WORDS, Summary, choose_units
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import Unit, split_units
from trilevel.conversion.delta import read_delta
from trilevel.conversion.embedder import Embedder
from trilevel.data.documents import Document, load_jsonl
from trilevel.errors import CheckpointError
from trilevel.report.machine import machine_block

__all__ = ["Case", "Summary", "evaluate", "prepare", "report", "runs", "summarize", "systems"]

TECH = "docs/tech.jsonl.xz"
# both 2,048-token runs, kept so that the bars can be measured again without training
KEPT_RUNS = Path(__file__).parents[3] / "benchmarks" / "models" / "documents"
MEASURES = ("rouge1", "rouge2", "rougeL")

# name of the bar, its system (None: ours), measure, the other system, comparison, bar
_BARS: tuple[tuple[str, str | None, int, str, str, float], ...] = (
    ("rouge1_vs_dense", None, 0, "dense", ">=", 0.99),
    ("rouge2_vs_dense", None, 1, "dense", ">=", 0.99),
    ("rougeL_vs_dense", None, 2, "dense", ">=", 0.99),
    ("rouge1_vs_lead", None, 0, "lead", ">", 1.0),
    ("rouge1_vs_lexrank", None, 0, "lexrank", ">", 1.0),
    ("rouge1_vs_textrank", None, 0, "textrank", ">", 1.0),
    ("minilm_rouge1_vs_scratch", "minilm", 0, "shipped", ">", 1.0),
    ("minilm_rouge1_vs_centroid", "minilm", 0, "centroid", ">", 1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One document ready to be summarised in any way."""

    document: Document
    units: list[Unit]
    encoded: Encoded

    def sentences(self, indices: Sequence[int]) -> list[str]:
        """Texts of units."""
        return [self.units[i].text for i in indices]


Chooser = Callable[[Case], list[int]]


def prepare(path: Path, *, split: str = "test", limit: int | None = None) -> list[Case]:
    """The documents of a split, whole, with units and tokens."""
    documents = load_jsonl(path, split=split, limit=limit)
    encoded = encode_corpus(documents, shipped_tokenizer())
    pairs = zip(documents, encoded, strict=True)
    return [Case(document=document, units=split_units(document), encoded=arrays) for document, arrays in pairs]


def runs(
    checkpoint: Path | None = None, dense: Path | None = None, minilm: Path | None = None
) -> dict[str, Path | None]:
    """The models to compare: both 2,048-token runs, the shipped model with and without focus, the one on MiniLM.

    Runs that are not given are those kept in the repository for the bars; one that is not there is left out.
    """
    kept = {"trilevel": checkpoint or KEPT_RUNS / "multilevel", "dense": dense or KEPT_RUNS / "dense"}
    given = {"trilevel": checkpoint, "dense": dense}
    found: dict[str, Path | None] = {name: path for name, path in kept.items() if given[name] or path.is_dir()}
    if not found:
        raise CheckpointError(
            f"no model to evaluate: {KEPT_RUNS} is not there. Give --checkpoint and --dense-checkpoint with folders "
            "that `trilevel train documents` wrote."
        )
    if (PRETRAINED / CHECKPOINT_FOLDER).exists():
        found |= {"shipped": None, "shipped+focus": None}
    if minilm or (MINILM / CHECKPOINT_FOLDER).exists():
        found["minilm"] = minilm or MINILM
    return found


def systems(models: Mapping[str, str | Path | None], *, budget_words: int = DEFAULT_BUDGET_WORDS) -> dict[str, Chooser]:
    """Ways to summarise: every model of `models` (name -> run folder, None = shipped), the baselines and the oracle.

    A run whose name ends in `+focus` sends only a fifth of the units through the deep blocks. Beside a run on a
    pretrained encoder stands `centroid`: the same encoder before conversion.
    """
    selection = Selection(words=budget_words)
    found: dict[str, Chooser] = {}
    rankings = dict(baselines.RANKINGS)
    for name, path in models.items():
        model, tokenizer = load_run(path)
        if isinstance(model.config.tokens, Backbone) and path is not None:
            found[name] = _by_backbone(model, tokenizer, selection)
            rankings["centroid"] = baselines.centroid(Embedder.load(read_delta(Path(path) / ENCODER_FOLDER).source))
            continue
        focus = model.config.focus
        fraction = focus.fraction if name.endswith("+focus") and focus is not None else None
        found[name] = _by_model(model, selection, fraction)
    for name, rank in rankings.items():
        found[name] = _by_ranking(rank, selection)
    found["oracle"] = lambda case: [int(i) for i in np.flatnonzero(case.encoded.oracle)]
    return found


def _by_model(model: DocumentModel, selection: Selection, fraction: float | None) -> Chooser:
    def chosen(case: Case) -> list[int]:
        scores = score_units(model, case.encoded, focus_fraction=fraction)
        return choose_units(case.units, scores, case.encoded, selection)

    return chosen


def _by_backbone(model: DocumentModel, tokenizer: DocumentTokenizer, selection: Selection) -> Chooser:
    """As `_by_model`, with the tokens of the pretrained encoder, whose vectors are kept in the cache."""
    assert isinstance(model.config.tokens, Backbone)
    assert model.encoder is not None
    stored = StoredVectors(model.encoder, model.config.tokens)

    def chosen(case: Case) -> list[int]:
        with torch.inference_mode():
            encoded = stored.add(encode(case.units, tokenizer, max_tokens=model.config.max_tokens))
        return choose_units(case.units, score_units(model, encoded), encoded, selection)

    return chosen


def _by_ranking(rank: Callable[[Sequence[str]], list[int]], selection: Selection) -> Chooser:
    def chosen(case: Case) -> list[int]:
        candidates = [int(i) for i in np.flatnonzero(case.encoded.unit_selectable)]
        order = [candidates[place] for place in rank(case.sentences(candidates))]
        return choose(order, [unit.text for unit in case.units], [unit.length for unit in case.units], selection)

    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one system did: `scores` (documents, 3) ROUGE-1/2/L, `words` (documents,), chosen units per document."""

    scores: np.ndarray
    words: np.ndarray
    chosen: list[list[int]]


def evaluate(
    cases: Sequence[Case],
    ways: Mapping[str, Chooser],
    *,
    on_progress: Callable[[str, int], None] | None = None,
) -> dict[str, Outcome]:
    """Summarise every case in every way and score it; `on_progress(name, done)` is called after each document."""
    found = {}
    for name, way in ways.items():
        chosen, scores, words = [], [], []
        for number, case in enumerate(cases, start=1):
            indices = way(case)
            chosen.append(indices)
            scores.append(rouge(case.document.abstract, case.sentences(indices)))
            words.append(sum(case.units[i].words for i in indices))
            if on_progress is not None:
                on_progress(name, number)
        found[name] = Outcome(scores=np.array(scores), words=np.array(words), chosen=chosen)
    return found


def report(outcomes: Mapping[str, Outcome], *, ours: str = "trilevel", with_bars: bool = True) -> dict[str, Any]:
    """The JSON document of an evaluation: machine, rows (mean and 95% interval over documents) and bars."""
    return {
        "case": "documents",
        "machine": machine_block(),
        "documents": len(next(iter(outcomes.values())).scores),
        "rows": [_row(name, outcome, outcomes.get("dense")) for name, outcome in outcomes.items()],
        "ratios": _ratios(outcomes, ours) + _ratios(outcomes, "minilm"),
        "bars": [
            _bar(outcomes, own or ours, name, column, other, op, bar) for name, own, column, other, op, bar in _BARS
        ]
        if with_bars
        else [],
    }


def _row(name: str, outcome: Outcome, dense: Outcome | None) -> dict[str, Any]:
    row: dict[str, Any] = {"system": name, "words": round(float(outcome.words.mean()), 1)}
    for column, measure in enumerate(MEASURES):
        scores = outcome.scores[:, column]
        low, high = bootstrap_mean(scores)
        row[measure] = round(float(scores.mean()), 3)
        row[f"{measure}_interval"] = [round(low, 3), round(high, 3)]
    if dense is not None:
        row["agreement_with_dense"] = round(agreement(outcome.chosen, dense.chosen), 4)
    return row


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Mean over documents of shared / all chosen units (Jaccard); two empty choices agree."""
    pairs = [(set(a), set(b)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))


def _bar(
    outcomes: Mapping[str, Outcome], ours: str, name: str, column: int, other: str, op: str, bar: float
) -> dict[str, Any]:
    if ours not in outcomes or other not in outcomes:
        # what was not run cannot hold
        return {"name": name, "value": None, "op": op, "bar": bar, "holds": False}
    value = bootstrap_ratio(outcomes[ours].scores[:, column], outcomes[other].scores[:, column], resamples=1).value
    holds = value >= bar if op == ">=" else value > bar
    return {"name": name, "value": round(value, 4), "op": op, "bar": bar, "holds": holds}


def _ratios(outcomes: Mapping[str, Outcome], ours: str) -> list[dict[str, Any]]:
    """Ours over every other system, each measure with its 95% interval from a paired bootstrap."""
    found = []
    for other in (name for name in outcomes if name != ours and ours in outcomes):
        row: dict[str, Any] = {"system": ours, "over": other}
        for column, measure in enumerate(MEASURES):
            ratio = bootstrap_ratio(outcomes[ours].scores[:, column], outcomes[other].scores[:, column])
            row[measure] = round(ratio.value, 4)
            row[f"{measure}_interval"] = [round(ratio.low, 4), round(ratio.high, 4)]
        found.append(row)
    return found
