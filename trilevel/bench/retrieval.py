"""`trilevel bench retrieval`: whether a converted encoder finds what the dense one finds, and more in long documents.

Long: an abstract finds its document, of which the abstract is no part. Short: the same with the first 256 tokens alone;
a sentence finds its neighbour; the cosine between both encoders' vectors of a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trilevel.bench.encoders_contenders import MINILM, converted_source
from trilevel.bench.harness import Bar, Progress, Report
from trilevel.bench.retrieval_score import Found, mean_interval, ranks, recall_ratio
from trilevel.bench.retrieval_texts import SETS, load_set, paragraphs, sentence_pairs
from trilevel.bench.retrieval_vectors import Vectors
from trilevel.conversion.embedder import Embedder
from trilevel.conversion.source import load_source
from trilevel.data.documents import Document

if TYPE_CHECKING:
    from rich.table import Table

SHORT, CUT = 256, 512
"""Tokens that MiniLM cuts a text at, and that its positions were trained for."""

AT = 10
CONVERTED, DENSE = "converted", "dense"
WHOLE, TRUNCATED = "converted, whole", f"dense, first {CUT}"
CHUNKS = (f"dense, mean of chunks of {SHORT}", f"dense, mean of chunks of {CUT}")
LONG, START, SENTENCES = "abstract to document", f"abstract to first {SHORT} tokens", "sentence to its neighbour"
GATE = 1e-5
"""Largest difference between a vector made in a batch and one made alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalCase:
    """What is measured.

    Args:
        folder: the converted MiniLM.
        data: folder of the data sets; None for what TRILEVEL_DATA names.
        documents: of each set, spread evenly over its test split; None for all. Fewer are found more easily: with half
            of them nearly every variant finds everything.
        pairs: of neighbouring sentences a document.
        paragraphs: a document, whose cosines are compared.
        most_tokens: of a document.
        store: file that keeps vectors; None keeps them in memory.
        has_bars: whether the documents are enough for bars.
    """

    folder: str
    data: Path | None = None
    documents: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(SETS))
    pairs: int = 4
    paragraphs: int = 2
    most_tokens: int = 65_536
    store: Path | None = Path("out/bench/retrieval/vectors.sqlite")
    has_bars: bool = True

    @staticmethod
    def smoke(folder: str, data: Path | None = None) -> RetrievalCase:
        """A few documents, cut, to see that vectors made together equal those made alone; no bars."""
        return RetrievalCase(
            folder=folder, data=data, documents=dict.fromkeys(SETS, 6), most_tokens=700, store=None, has_bars=False
        )


class _Steps:
    """What is being done, as a part of all tokens that are to be read."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done, self._total, self._what = progress, 0, 1, ""

    def plan(self, tokens: int) -> None:
        self._total = max(1, tokens)

    def begin(self, what: str) -> Callable[[int], None]:
        self._what = what
        self(0)
        return self

    def __call__(self, tokens: int) -> None:
        self._done += tokens
        self._progress(self._what, min(1.0, self._done / self._total))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoders:
    dense: Vectors
    converted: Vectors

    def named(self, name: str) -> Vectors:
        return self.converted if name.startswith(CONVERTED) else self.dense


Texts = Sequence[str]
Embed = Callable[[Texts, Callable[[int], None]], Tensor]


def run(case: RetrievalCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Embed everything that is not kept from an earlier run, then rank."""
    dense, converted = Embedder(load_source(MINILM)), Embedder(converted_source(case.folder))
    sets = {name: load_set(name, data=case.data, most=most) for name, most in case.documents.items()}
    store = Path(":memory:") if case.store is None else case.store
    encoders = _Encoders(dense=Vectors(dense, store), converted=Vectors(converted, store))
    try:
        return _run(case, sets, encoders, _Steps(progress))
    finally:
        encoders.dense.close()
        encoders.converted.close()
        progress("done", 1.0)


def _run(case: RetrievalCase, sets: Mapping[str, list[Document]], encoders: _Encoders, steps: _Steps) -> Report:
    broken = broken_encoders(encoders, [d.abstract for own in sets.values() for d in own[:4]])
    variants = _variants(case, encoders)
    steps.plan(_planned(case, sets, encoders))
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for name, documents in sets.items():
        for task, pairs in _tasks(case, documents).items():
            found = {
                variant: _found(pairs, embed, steps.begin(f"{name}, {task}: {variant}"))
                for variant, embed in variants[task].items()
            }
            rows += [_row(task, name, variant, own) for variant, own in found.items()]
            ratios += _ratios(task, name, found)
    cosines = _cosines(case, sets, encoders, steps)
    return Report(
        case="retrieval",
        rows=rows,
        measurements=[*ratios, *cosines],
        bars=bars(ratios, cosines) if case.has_bars else [],
        settings={
            "encoder": case.folder,
            "documents": {name: len(documents) for name, documents in sets.items()},
            "pairs_a_document": case.pairs,
            "paragraphs_a_document": case.paragraphs,
            "most_tokens": case.most_tokens,
            "recall_at": AT,
        },
        broken=broken,
    )


def broken_encoders(encoders: _Encoders, texts: Texts) -> list[str]:
    """Which encoder gives a text another vector in a batch than alone."""
    found = []
    for name in (DENSE, CONVERTED):
        embedder = encoders.named(name).embedder
        together = embedder.embed(texts, max_tokens=CUT)
        alone = torch.cat([embedder.embed([text], max_tokens=CUT) for text in texts])
        # a value that is no number fails as well
        if not (together - alone).abs().max() <= GATE:
            found.append(f"{name} encoder: vectors made together differ from those made alone")
    return found


def _variants(case: RetrievalCase, encoders: _Encoders) -> dict[str, dict[str, Embed]]:
    """How each task is solved; queries and candidates are embedded alike."""

    def cut(name: str, tokens: int) -> Embed:
        vectors = encoders.named(name)
        return lambda texts, told: vectors.of(vectors.embedder.tokens(texts, max_tokens=tokens), told)

    def chunked(size: int) -> Embed:
        vectors = encoders.dense
        return lambda texts, told: vectors.of_chunks(
            vectors.embedder.tokens(texts, max_tokens=case.most_tokens), size, told
        )

    return {
        LONG: {
            TRUNCATED: cut(DENSE, CUT),
            f"converted, first {CUT}": cut(CONVERTED, CUT),
            WHOLE: cut(CONVERTED, case.most_tokens),
            CHUNKS[0]: chunked(SHORT),
            CHUNKS[1]: chunked(CUT),
        },
        START: {name: cut(name, SHORT) for name in (DENSE, CONVERTED)},
        SENTENCES: {name: cut(name, SHORT) for name in (DENSE, CONVERTED)},
    }


Pairs = tuple[list[str], list[str], list[int]]


def _tasks(case: RetrievalCase, documents: Sequence[Document]) -> dict[str, Pairs]:
    """Queries, their candidates, and the documents they are from."""
    whole = [document.abstract for document in documents], [document.text for document in documents]
    sentences = sentence_pairs(documents, per_document=case.pairs)
    return {
        LONG: (*whole, list(range(len(documents)))),
        START: (*whole, list(range(len(documents)))),
        SENTENCES: (
            [pair.first for pair in sentences],
            [pair.second for pair in sentences],
            [pair.document for pair in sentences],
        ),
    }


def _found(pairs: Pairs, embed: Embed, told: Callable[[int], None]) -> Found:
    queries, candidates, documents = pairs
    return Found(
        ranks=ranks(embed(queries, told), embed(candidates, told)),
        documents=np.array(documents),
        candidates=len(candidates),
    )


def _row(task: str, name: str, variant: str, found: Found) -> dict[str, Any]:
    return {
        "task": task,
        "set": name,
        "variant": variant,
        "queries": len(found.ranks),
        "candidates": found.candidates,
        f"recall_at_{AT}": found.recall(AT),
        "recall_at_1": found.recall(1),
        "mrr": found.mrr,
    }


def _ratios(task: str, name: str, found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """The converted encoder's recall over each dense variant's."""
    this = WHOLE if task == LONG else CONVERTED
    return [
        {"task": task, "set": name, "this": this, "other": other, "at": at, **dataclasses.asdict(ratio)}
        for other in found
        if other != this
        for at in (AT, 1)
        for ratio in [recall_ratio(found[this], found[other], most=at)]
    ]


def _short_texts(case: RetrievalCase, documents: Sequence[Document]) -> dict[str, list[str]]:
    return {
        "abstracts": [document.abstract for document in documents],
        "paragraphs": paragraphs(documents, per_document=case.paragraphs),
    }


def _cosines(
    case: RetrievalCase, sets: Mapping[str, list[Document]], encoders: _Encoders, steps: _Steps
) -> list[dict[str, Any]]:
    """Cosine of both encoders' vectors of texts of at most 256 tokens, by kind of text and by length."""
    by_kind: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for name, documents in sets.items():
        for kind, texts in _short_texts(case, documents).items():
            rows = [row for row in encoders.dense.embedder.tokens(texts) if len(row) <= SHORT]
            if not rows:
                continue
            told = steps.begin(f"{name}, cosines of {kind}")
            cosine = F.cosine_similarity(encoders.dense.of(rows, told), encoders.converted.of(rows, told))
            by_kind[name, kind] = cosine, torch.tensor([len(row) for row in rows])
    cosine, lengths = (torch.cat(parts) for parts in zip(*by_kind.values(), strict=True))
    found = [_cosine("all", "texts", cosine), *(_cosine(*key, own) for key, (own, _) in by_kind.items())]
    for low, high in ((0, 64), (64, 128), (128, SHORT)):
        own = cosine[(lengths > low) & (lengths <= high)]
        found += [_cosine("all", f"texts of {low + 1} to {high} tokens", own)] if len(own) else []
    return found


def _cosine(name: str, kind: str, cosine: Tensor) -> dict[str, Any]:
    low, high = mean_interval(cosine.double().numpy())
    return {
        "task": "cosine", "set": name, "texts": kind, "count": len(cosine), "mean": float(cosine.mean()), "low": low,
        "high": high, "lowest": float(cosine.min()),
    }  # fmt: skip


def _planned(case: RetrievalCase, sets: Mapping[str, list[Document]], encoders: _Encoders) -> int:
    """Tokens that all variants read together, for the bar; each chunk's own special tokens are left out."""
    tokens = 0
    embedder = encoders.dense.embedder

    def add(texts: Texts, *limits: int) -> None:
        nonlocal tokens
        lengths = [len(row) for row in embedder.tokens(texts)]
        tokens += sum(min(length, limit) for limit in limits for length in lengths)

    whole = [case.most_tokens] * 3
    for documents in sets.values():
        for texts in ([d.text for d in documents], [d.abstract for d in documents]):
            add(texts, *whole, CUT, CUT, SHORT, SHORT)
        pairs = sentence_pairs(documents, per_document=case.pairs)
        add([text for pair in pairs for text in (pair.first, pair.second)], SHORT, SHORT)
        add([text for texts in _short_texts(case, documents).values() for text in texts], SHORT, SHORT)
    return tokens


def bars(ratios: Sequence[Mapping[str, Any]], cosines: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The bars of issue 4; the worse set counts, the better way to cut documents into chunks, the worse short task."""
    ratio = {(r["task"], r["set"], r["other"]): r["value"] for r in ratios if r["at"] == AT}
    sets = sorted({r["set"] for r in ratios})
    short = [value for (task, _, _), value in ratio.items() if task in (START, SENTENCES)]
    cosine = next(row["mean"] for row in cosines if row["texts"] == "texts")
    truncated = min(ratio[LONG, name, TRUNCATED] for name in sets)
    chunks = min(ratio[LONG, name, other] for name in sets for other in CHUNKS)
    return [
        Bar(name="short_cosine", value=cosine, op=">=", bar=0.98),
        Bar(name="short_recall_vs_dense", value=min(short), op=">=", bar=0.99),
        Bar(name="long_recall_vs_truncated", value=truncated, op=">", bar=1),
        Bar(name="long_recall_vs_chunks", value=chunks, op=">", bar=1),
    ]


def retrieval_tables(report: Report) -> list[Table]:
    """Recall of each variant, and the ratios with their intervals."""
    from rich.table import Table

    recalls = Table(title="what is found among the first", title_justify="left")
    for column in ("task", "set", "variant", "queries", f"recall@{AT}", "recall@1", "MRR"):
        recalls.add_column(column, justify="left" if column in ("task", "set", "variant") else "right")
    for row in report.rows:
        numbers = (f"{row[name]:.3f}" for name in (f"recall_at_{AT}", "recall_at_1", "mrr"))
        recalls.add_row(row["task"], row["set"], row["variant"], str(row["queries"]), *numbers)
    ratios = Table(title="converted over dense, 95% interval over documents", title_justify="left")
    for column in ("task", "set", "over", "value", "interval"):
        ratios.add_column(column, justify="right" if column in ("value", "interval") else "left")
    for row in report.measurements:
        if row["task"] == "cosine":
            what, value = f"{row['count']:,} {row['texts']}", row["mean"]
        else:
            what, value = f"{row['other']}, recall@{row['at']}", row["value"]
        ratios.add_row(row["task"], row["set"], what, f"{value:.4f}", f"{row['low']:.3f} to {row['high']:.3f}")
    return [recalls, ratios]
