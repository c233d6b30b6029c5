"""The demo: summarise one long document, compare dense and multi-level attention on it, write the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trilevel.applications.documents.checkpoint import load_run
from trilevel.applications.documents.compare import Comparison, Tell, agreement, compare, rank_correlation
from trilevel.applications.documents.encoded import MAX_TOKENS, Encoded, encode
from trilevel.applications.documents.measure import LIMIT_S, Measured
from trilevel.applications.documents.page import Look, look, token_spans, unit_views
from trilevel.applications.documents.rouge import rouge
from trilevel.applications.documents.select import Selection
from trilevel.applications.documents.summary import choose_units
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import Unit, split_units
from trilevel.artifact.check import default_runtime, installed
from trilevel.attention.near import has_fast_products
from trilevel.data.documents import Document
from trilevel.data.sentences import count_words
from trilevel.errors import ConfigError
from trilevel.model.config import EncoderConfig, layer_counts
from trilevel.report.content import Contender, ReportContent
from trilevel.report.html import write_report
from trilevel.report.machine import machine_block

NUM_SENTENCES = 10
AGREEMENT = "sentences in both summaries / sentences in either (Jaccard), same weights, dense by SDPA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo found: the summary's sentences, the rows of the table with notes, and the figures as JSON values.

    In `figures`, `*_peak_bytes` are peaks of whole processes; `memory_ratio` and `memory_vs_sdpa` are ratios above
    `empty_peak_bytes`.
    """

    title: str
    sentences: list[str]
    contenders: tuple[Contender, ...]
    notes: tuple[str, ...]
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    document: Document
    tokenizer: DocumentTokenizer
    units: list[Unit]
    encoded: Encoded
    look: Look
    chosen: list[int]
    dense_chosen: list[int] | None
    bfloat16_chosen: list[int] | None
    int8_chosen: list[int] | None
    comparison: Comparison
    precisions: tuple[str, ...]


def run_demo(
    document: Document,
    *,
    out_dir: Path,
    num_sentences: int = NUM_SENTENCES,
    model: Path | None = None,
    memory_bytes: int | None = None,
    tell: Tell = lambda text, share: None,
) -> Demo:
    """Summarise, compare, and write `report.html` into `out_dir`.

    Args:
        document: what to summarise; at most 65,536 tokens of it are used.
        out_dir: made when it is not there.
        num_sentences: sentences in the summary.
        model: folder of a trained model, None for the shipped one.
        memory_bytes: what materialised attention may take, default half of the free memory.
        tell: called with what is being done and the share that is done.

    Raises:
        InputError: the document has no word, or the report cannot be written.
        CheckpointError: the model is missing or damaged.
    """
    tell("reading the document", 0.0)
    trained, tokenizer = load_run(model)
    tokens = trained.config.tokens
    if not isinstance(tokens, EncoderConfig):
        raise ConfigError(
            "the demo shows models with an encoder of their own; this one stands on a pretrained encoder."
        )
    selection = Selection(sentences=num_sentences)
    units = split_units(document)
    encoded = encode(units, tokenizer).cut(MAX_TOKENS)
    tell("summarising", 0.02)
    seen = look(trained.float(), tokenizer, units, encoded)
    comparison = compare(
        encoded,
        num_heads=max(layer_counts(tokens.num_heads, tokens.num_layers, "num_heads")),
        has_focus=trained.config.focus is not None,
        has_bfloat16=has_fast_products(torch.bfloat16),
        has_int8=model is None and has_runtime(),
        model=model,
        threads=torch.get_num_threads(),
        memory_bytes=memory_bytes,
        tell=lambda text, share: tell(text, 0.1 + 0.8 * share),
    )
    tell("writing the report", 0.95)

    def chosen(measured: Measured | None) -> list[int] | None:
        if measured is None or measured.scores is None:
            return None
        return choose_units(units, measured.scores, encoded, selection)

    result = _Result(
        document=document,
        tokenizer=tokenizer,
        units=units,
        encoded=encoded,
        look=seen,
        chosen=choose_units(units, seen.scores, encoded, selection),
        dense_chosen=chosen(comparison.sdpa),
        bfloat16_chosen=chosen(comparison.bfloat16),
        int8_chosen=chosen(comparison.int8),
        comparison=comparison,
        precisions=tuple(_left_out(comparison, is_shipped=model is None)),
    )
    return _finished(result, out_dir / "report.html")


def _finished(result: _Result, report: Path) -> Demo:
    figures = _figures(result, report)
    contenders = _contenders(result)
    notes = _notes(result)
    document, encoded = result.document, result.encoded
    content = ReportContent(
        title=document.title or document.id,
        source=document.source,
        units=unit_views(
            result.units,
            encoded,
            token_spans(result.tokenizer, result.units, encoded),
            chosen=result.chosen,
            scores=result.look.scores,
            global_tokens=result.look.global_tokens,
        ),
        contenders=contenders,
        facts=tuple(_facts(figures)),
        notes=notes,
        abstract=document.abstract,
        rouge=figures["rouge"],
        global_tokens=result.look.global_tokens,
        level_maps=result.look.level_maps,
        machine=machine_block(),
    )
    write_report(report, content)
    # an item of a list stands for itself here
    sentences = [result.units[index].text.removeprefix("- ") for index in result.chosen]
    return Demo(title=content.title, sentences=sentences, contenders=contenders, notes=notes, figures=figures)


def _figures(result: _Result, report: Path) -> dict[str, Any]:
    found, document = result.comparison, result.document
    dense = found.sdpa.scores
    mask = result.encoded.unit_selectable
    scored = None
    if document.abstract:
        values = rouge(document.abstract, [result.units[index].text for index in result.chosen])
        scored = dict(zip(("rouge1", "rouge2", "rougeL"), values, strict=True))
    return {
        "words": count_words(document.text.replace("#", "")),
        "tokens": result.encoded.num_tokens,
        "sdpa_s": found.sdpa.median_s,
        "trilevel_s": found.trilevel.median_s,
        "speedup": found.speedup,
        "speedup_is_lower_bound": found.is_lower_bound,
        "focus_s": None if found.focus is None else found.focus.median_s,
        "materialised_s": found.materialised.median_s,
        "materialised_peak_bytes": found.materialised.peak_memory_bytes,
        "sdpa_peak_bytes": found.sdpa.peak_memory_bytes,
        "trilevel_peak_bytes": found.trilevel.peak_memory_bytes,
        "empty_peak_bytes": found.empty.peak_memory_bytes,
        "memory_tokens": found.materialised.tokens,
        "memory_ratio": found.memory_ratio,
        "memory_vs_sdpa": found.memory_vs_sdpa,
        "agreement_with_dense": None if result.dense_chosen is None else agreement(result.chosen, result.dense_chosen),
        "agreement_how": AGREEMENT,
        "rank_correlation_with_dense": (
            None if dense is None else rank_correlation(result.look.scores[mask], dense[: len(mask)][mask])
        ),
        "bfloat16_s": None if found.bfloat16 is None else found.bfloat16.median_s,
        "bfloat16_agreement": None
        if result.bfloat16_chosen is None
        else agreement(result.chosen, result.bfloat16_chosen),
        "int8_s": None if found.int8 is None else found.int8.median_s,
        "int8_peak_bytes": None if found.int8 is None else found.int8.peak_memory_bytes,
        "int8_loaded_bytes": None if found.int8 is None else found.int8.loaded_bytes,
        "int8_runtime": None if found.int8 is None else default_runtime(),
        "int8_agreement": None if result.int8_chosen is None else agreement(result.chosen, result.int8_chosen),
        "rouge": scored,
        "threads": torch.get_num_threads(),
        "report": str(report),
    }


def has_runtime() -> bool:
    """Whether something that runs the INT8 artifact without torch is installed."""
    return any(name != "torch" for name in installed())


def _left_out(found: Comparison, *, is_shipped: bool) -> Iterator[str]:
    """What is said in place of a row."""
    if found.bfloat16 is None:
        yield "bfloat16 is left out: this processor has no bfloat16 arithmetic, and without it takes 20 times as long."
    if found.int8 is None and is_shipped:
        yield "INT8 is left out: no runtime is installed. pip install 'trilevel[onnxruntime]'"
    elif found.int8 is None:
        yield "INT8 is left out: the artifact holds the shipped model."


def _same(ours: list[int], theirs: list[int] | None) -> str:
    """How many sentences of the summary in float32 another precision chose as well."""
    if theirs is None:
        return ""
    return "the same sentences" if ours == theirs else f"{len(set(ours) & set(theirs))} of {len(ours)} sentences"


def _contenders(result: _Result) -> tuple[Contender, ...]:
    found = result.comparison
    same = {"bfloat16": result.bfloat16_chosen, "int8": result.int8_chosen, "sdpa": result.dense_chosen}
    rows: list[tuple[str, str, Measured | None]] = [
        ("trilevel", "trilevel", found.trilevel),
        ("trilevel-focus", "trilevel, focus", found.focus),
        ("bfloat16", "trilevel, bfloat16", found.bfloat16),
        ("int8", f"trilevel, INT8 in {default_runtime()}", found.int8),
        ("sdpa", "dense, SDPA", found.sdpa),
        ("materialised", "dense, materialised", found.materialised),
        ("trilevel-short", "trilevel, same length", found.trilevel_short),
    ]
    return tuple(
        Contender(
            name=name,
            label=label,
            tokens=measured.tokens,
            seconds=measured.median_s,
            runs=len(measured.seconds),
            peak_memory_bytes=found.above_empty(measured),
            note=measured.stopped or _same(result.chosen, same.get(name)),
        )
        for name, label, measured in rows
        if measured is not None
    )


def _notes(result: _Result) -> tuple[str, ...]:
    found = result.comparison
    notes = list(result.precisions)
    if found.int8 is not None:
        notes.append("INT8 runs without torch; its memory is that above its own process with everything loaded.")
    if found.trilevel_short is not None:
        notes.append(
            f"Materialised attention ran on the first {found.materialised.tokens:,} tokens, the longest length whose "
            "weights fit into half of the free memory; its memory is compared with trilevel's at the same length."
        )
    if found.focus is not None:
        notes.append("With focus, only the most important sentences pass the deep layers.")
    if found.is_lower_bound:
        notes.append(f"Dense attention was stopped after {LIMIT_S:.0f} s, so the speed-up is a lower bound.")
    if found.materialised.stopped:
        notes.append("Materialised attention did not finish; its peak memory is what it had reached by then.")
    if result.encoded.units_left_out:
        notes.append(f"{result.encoded.units_left_out:,} sentences beyond {MAX_TOKENS:,} tokens were left out.")
    return tuple(notes)


def _facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("words", f"{figures['words']:,}"), ("tokens", f"{figures['tokens']:,}")]
    at_least = "≥ " if figures["speedup_is_lower_bound"] else ""
    for name, key, form in (
        ("time", "trilevel_s", "{:.2f} s"),
        ("faster than SDPA", "speedup", at_least + "{:.1f}×"),
        ("of materialised memory", "memory_ratio", "{:.1%}"),
        ("of SDPA's memory", "memory_vs_sdpa", "{:.0%}"),
        ("agreement with dense", "agreement_with_dense", "{:.0%}"),
    ):
        if figures[key] is not None:
            found.append((name, form.format(figures[key])))
    return found
