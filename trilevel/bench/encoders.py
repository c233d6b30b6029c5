"""`trilevel bench encoders`: one long document to its vector, dense, converted, and the sparse encoders of others."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trilevel.applications.documents.builtin import builtin_document
from trilevel.applications.documents.memory import free_bytes, reset_peak, return_freed
from trilevel.bench.encoders_contenders import Build, Encode, EncoderContender, Models, contenders, forget, quiet
from trilevel.bench.harness import Bar, Progress, Report, Timing, check, interleave
from trilevel.bench.memory import peak_memory_bytes
from trilevel.conversion.embed import pooled
from trilevel.errors import ImplementationError, TrilevelError

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
BAR_TOKENS = 8_192
OURS, DENSE, MATERIALISED = "trilevel converted", "trilevel dense", "transformers eager"
MEASURED_IN_PROCESSES = (OURS, DENSE, "transformers sdpa", MATERIALISED)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodersCase:
    """What is measured.

    Args:
        folder: a converted MiniLM; None for one whose heads took their classes without a profile, which costs the same.
        tokens: of the document.
        checked_tokens: of the check of what is not checked whole.
        precisions: names of torch types.
        budget_s: seconds of timing that all contenders of a precision share.
        most_bytes: a contender predicted above it is skipped.
        memory: also measure peak memory, float32, each in a process of its own.
    """

    folder: str | None = None
    tokens: int = BAR_TOKENS
    checked_tokens: int = 1_024
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    budget_s: float = 60.0
    most_bytes: int = 12 * GIB
    memory: bool = True

    @staticmethod
    def smoke(folder: str | None = None) -> EncodersCase:
        """The check of every contender on a short document and a glance at the clock; no bars."""
        return EncodersCase(folder=folder, tokens=600, checked_tokens=200, budget_s=0.0, memory=False)


def run(case: EncodersCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Check and time every contender in every precision; bars at 8,192 tokens."""
    models = Models(folder=case.folder, tokens=case.tokens)
    ids = document_ids(models, case.tokens)
    rows: list[dict[str, Any]] = []
    parts = len(case.precisions) + case.memory
    for place, precision in enumerate(case.precisions):
        rows += _measure(case, models, ids, precision, lambda what, at=place: progress(what, at / parts))  # type: ignore[misc]
    if case.memory:
        _add_memory(case, rows, lambda what: progress(what, len(case.precisions) / parts))
    progress("done", 1.0)
    return Report(
        case="encoders",
        rows=digest(rows),
        measurements=rows,
        bars=bars(rows) if case.tokens == BAR_TOKENS and case.memory else [],
        settings={
            "tokens": case.tokens,
            "encoder": case.folder or "MiniLM, 7:4:1 heads a layer assigned without a profile",
            "threads": torch.get_num_threads(),
            "checked_tokens": case.checked_tokens,
            "budget_s": case.budget_s,
        },
        broken=sorted({row["contender"] for row in rows if row["status"] == "failed" and row["ours"]}),
    )


def digest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a table of results shows of the measurements."""
    return [
        {
            "precision": row["precision"],
            "encoder": row["contender"],
            "ms": row.get("median_ms"),
            "times_faster_than_dense": row.get("fastest_dense_over_this"),
            "peak_memory_bytes": row.get("peak_memory_bytes"),
            "what_is_inside": row["scope"],
            "note": row.get("reason"),
        }
        for row in rows
    ]


def document_ids(models: Models, tokens: int) -> Tensor:
    """The built-in document's first ids, (1, tokens), from its start again where it ends."""
    encoding = models.dense.tokenizer.encode(builtin_document().text)
    ids = torch.tensor(encoding.ids)
    return ids[torch.arange(tokens) % len(ids)][None]


def _measure(
    case: EncodersCase, models: Models, ids: Tensor, precision: str, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Tensor]] = {}
    defined: dict[Build, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode(), quiet():
        for contender in contenders():
            tell(f"{precision}: checking {contender.name}")
            row: dict[str, Any] = {
                "contender": contender.name,
                "kind": contender.kind,
                "ours": contender.is_ours,
                "precision": precision,
                "tokens": case.tokens,
                "scope": contender.scope,
            }
            encode = _admit(case, contender, models, ids, row, defined)
            if encode is not None:
                runs[contender.name] = _embedding(encode, models, ids)
            rows.append(row)
        tell(f"{precision}: timing {len(runs)} encoders in turn")
        timings = interleave(runs, budget_s=case.budget_s, min_repeats=3 if case.budget_s else 1)
    _fill(rows, timings, case.tokens)
    return rows


def _embedding(encode: Encode, models: Models, ids: Tensor) -> Callable[[], Tensor]:
    sentence = models.dense.sentence
    return lambda: pooled(encode(ids).float(), None, sentence)


def _admit(
    case: EncodersCase,
    contender: EncoderContender,
    models: Models,
    ids: Tensor,
    row: dict[str, Any],
    defined: dict[Build, tuple[Tensor, Tensor]],
) -> Encode | None:
    """Build a contender and check it; None, with the reason in `row`, when it is not to be timed.

    `defined` keeps what definitions gave, in float64 and in the precision.
    """
    dtype = getattr(torch, row["precision"])
    predicted = contender.peak_bytes(case.tokens, dtype.itemsize)
    limit = min(case.most_bytes, free_bytes() or case.most_bytes)
    if contender.absence is not None or predicted > limit:
        reason = contender.absence or f"predicted {predicted / GIB:.1f} GiB, {limit / GIB:.1f} GiB allowed or free"
        row.update(status="skipped", reason=reason)
        return None
    try:
        encode = contender.build(models, dtype)
        if contender.define is not None:
            given = ids if contender.is_checked_whole else ids[:, : case.checked_tokens]
            output = encode(given)
            if contender.define not in defined:
                exact, rounded = (contender.define(models, own)(given) for own in (torch.float64, dtype))
                defined[contender.define] = (exact, rounded)
            gate = check(output, *defined[contender.define])
            row.update(error=gate.error, limit=gate.limit, checked_tokens=given.shape[1])
            if not gate.passed:
                row.update(status="failed", reason=f"error {gate.error:.1e} above the {gate.limit:.1e} allowed")
                return None
    except (RuntimeError, ValueError, TypeError, ImportError, TrilevelError) as error:
        row.update(status="failed", reason=f"raised {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return None
    row["status"] = "measured"
    return encode


def _fill(rows: list[dict[str, Any]], timings: dict[str, Timing], tokens: int) -> None:
    dense = [
        timings[row["contender"]].median_ms for row in rows if row["kind"] == "dense" and row["contender"] in timings
    ]
    for row in rows:
        if row["contender"] in timings:
            row.update(timings[row["contender"]].to_dict())
            row["tokens_per_s"] = 1e3 * tokens / row["median_ms"]
            if dense:
                row["fastest_dense_over_this"] = min(dense) / row["median_ms"]


def _add_memory(case: EncodersCase, rows: list[dict[str, Any]], tell: Callable[[str], None]) -> None:
    threads = torch.get_num_threads()
    for row in rows:
        is_measured = row["status"] == "measured" and row["precision"] == "float32"
        if is_measured and row["contender"] in MEASURED_IN_PROCESSES:
            tell(f"memory: {row['contender']}")
            try:
                row["peak_memory_bytes"] = peak_memory_bytes(
                    "trilevel.bench.encoders:one_pass", row["contender"], case.folder, case.tokens, threads,
                    timeout_s=300.0,
                )  # fmt: skip
            except ImplementationError as error:
                row["memory_reason"] = str(error)


def one_pass(name: str, folder: str | None, tokens: int, threads: int) -> Callable[[], object]:
    """For a process that measures memory: weights and one pass in float32, above the process that holds neither.

    A short pass has loaded the code that the long one runs, loading the weights does not count, freed memory goes back
    at once (decision 0004).
    """
    torch.set_num_threads(threads)
    return_freed(at_once=True)
    contender = next(contender for contender in contenders() if contender.name == name)
    models = Models(folder=folder, tokens=tokens)
    ids = document_ids(models, tokens)
    with quiet(), torch.inference_mode():
        _embedding(contender.build(models, torch.float32), models, ids[:, :512])()
    forget()
    gc.collect()

    def measured() -> None:
        with quiet():
            embedding = _embedding(contender.build(models, torch.float32), models, ids)
        forget()
        gc.collect()
        reset_peak()
        with torch.inference_mode():
            embedding()

    return measured


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The bars of issue 4."""
    ours = {row["precision"]: row for row in rows if row["contender"] == OURS}
    memory = {row["contender"]: row.get("peak_memory_bytes") for row in rows if row["precision"] == "float32"}
    sdpa = [size for name in (DENSE, "transformers sdpa") if (size := memory.get(name)) is not None]
    own, materialised = memory.get(OURS), memory.get(MATERIALISED)
    return [
        *(
            Bar(name=name, value=ours.get(precision, {}).get("fastest_dense_over_this"), op=">=", bar=6)
            for name, precision in (("encode_8k_fp32_vs_dense", "float32"), ("encode_8k_bf16_vs_dense", "bfloat16"))
        ),
        Bar(
            name="encode_8k_memory_ratio", value=own / materialised if own and materialised else None, op="<=", bar=0.2
        ),
        Bar(name="encode_8k_memory_vs_sdpa", value=own / min(sdpa) if own and sdpa else None, op="<=", bar=1.05),
    ]


def encoders_table(report: Report) -> Table:
    """Milliseconds of each encoder, how many times faster than the fastest dense one, memory, what it is."""
    from rich.table import Table

    tokens = report.settings["tokens"]
    table = Table(title=f"one document of {tokens:,} tokens to its vector", title_justify="left")
    for column in ("precision", "encoder", "ms", "times faster than dense", "MiB", "what is inside"):
        table.add_column(column, justify="right" if column in ("ms", "times faster than dense", "MiB") else "left")
    for row in report.measurements:
        is_measured = row["status"] == "measured"
        time = f"{row['median_ms']:,.0f}" if is_measured else f"{row['status']}: {row['reason']}"
        ratio = f"{row['fastest_dense_over_this']:.1f}" if "fastest_dense_over_this" in row else ""
        memory = f"{row['peak_memory_bytes'] / 2**20:,.0f}" if "peak_memory_bytes" in row else ""
        table.add_row(row["precision"], row["contender"], time, ratio, memory, row["scope"])
    return table
