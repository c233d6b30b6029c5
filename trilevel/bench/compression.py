"""`trilevel bench compression`: what 8 bits and levels give in size, speed and memory, beside the tools of others."""

from __future__ import annotations

import ctypes
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from trilevel.bench import compression_applications as applications
from trilevel.bench.compression_encoders import Call, Contender, Encoders, contenders, quiet
from trilevel.bench.compression_memory import (
    DENSE_OPENVINO,
    DENSE_OURS,
    DENSE_TORCH,
    MATERIALISED,
    MEASURED,
    OURS,
)
from trilevel.bench.compression_peak import share_of_peak
from trilevel.bench.encoders import document_ids
from trilevel.bench.encoders_contenders import Models
from trilevel.bench.harness import Bar, Progress, Report, interleave
from trilevel.bench.memory import peak_process_bytes
from trilevel.errors import ImplementationError, TrilevelError

if TYPE_CHECKING:
    from rich.table import Table

LONG, SHORT = 8_192, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionCase:
    """What is measured.

    Args:
        folder: a converted MiniLM; None for one whose heads took their classes without a profile, which costs the same.
        work: where graphs are kept from run to run; None makes them anew, in minutes.
        lengths: tokens of the documents.
        budget_s: seconds of timing that all contenders of a length share.
        memory: also measure memory at the longest, each in a process of its own.
        batch: of the linear maps whose share of the processor's best is measured; 0 leaves that out.
        peers: also measure the tools of others, which take minutes to quantize and compile.
        num_layers: of the encoder, the first ones alone; None for all.
        models: of the applications, see `compression_applications`; None leaves them out.
    """

    folder: str | None = None
    work: Path | None = None
    lengths: tuple[int, ...] = (SHORT, LONG)
    budget_s: float = 90.0
    memory: bool = True
    batch: int = 8
    peers: bool = True
    num_layers: int | None = None
    models: Path | None = applications.MODELS

    @staticmethod
    def smoke() -> CompressionCase:
        """The check of what is ours on a short document, no bars."""
        return CompressionCase(
            lengths=(192,), budget_s=0.0, memory=False, batch=0, peers=False, num_layers=1, models=None
        )


def run(case: CompressionCase, progress: Progress = lambda _what, _done: None) -> Report:
    """Check and time every contender at every length; bars at 512 and 8,192 tokens."""
    page_faults_off()
    rows: list[dict[str, Any]] = []
    found: dict[str, applications.Application] = {}
    parts = len(case.lengths) + case.memory + (case.batch > 0) + (case.models is not None)
    settings: dict[str, Any] = {
        "encoder": case.folder or "MiniLM, 7:4:1 heads a layer assigned without a profile",
        "threads": torch.get_num_threads(),
        "lengths": list(case.lengths),
        "budget_s": case.budget_s,
    }
    if case.models is not None:
        found = applications.measure(case.models, case.budget_s / 3, lambda what: progress(what, 0.0))
        settings["applications"] = [row for name, own in found.items() for row in own.rows(name)]
    start = int(case.models is not None)
    with ExitStack() as stack:
        work = case.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        for place, tokens in enumerate(case.lengths, start):
            encoders = Encoders(
                work,
                Models(folder=case.folder, tokens=tokens),
                lambda what, at=place: progress(what, at / parts),  # type: ignore[misc]
                case.num_layers,
            )
            rows += _measure(case, encoders, tokens)
        if case.memory:
            _add_memory(max(case.lengths), work, rows, lambda what: progress(what, (start + len(case.lengths)) / parts))
        if case.batch:
            progress("the share of the processor's best", (parts - 1) / parts)
            settings["int8_share_of_peak"] = share_of_peak(encoders, case.batch, SHORT)
    progress("done", 1.0)
    return Report(
        case="compression" if case.lengths else "compression-applications",
        rows=rows if case.lengths else settings.pop("applications", []),
        bars=[
            *(bars(rows, settings) if _is_whole(case) else []),
            *(applications.bars(found) if case.models is not None else []),
        ],
        settings=settings,
        broken=sorted({row["contender"] for row in rows if row["status"] == "failed" and row["ours"]}),
    )


def _is_whole(case: CompressionCase) -> bool:
    return {SHORT, LONG} <= set(case.lengths) and case.memory and case.batch > 0


def page_faults_off() -> None:
    """Let glibc keep large blocks: mapped anew at every call they flatter whatever allocates less than eager torch."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1
            libc.mallopt(m_mmap_threshold, largest)
            libc.mallopt(m_trim_threshold, largest)


def _measure(case: CompressionCase, encoders: Encoders, tokens: int) -> list[dict[str, Any]]:
    ids = document_ids(encoders.models, tokens).numpy()
    rows: list[dict[str, Any]] = []
    runs: dict[str, Call] = {}
    exact: dict[str, npt.NDArray[np.float32]] = {}
    chosen = [own for own in contenders() if case.peers or own.is_ours or own.name == DENSE_TORCH]
    for contender in chosen:
        encoders.tell(f"{tokens:,} tokens: checking {contender.name}")
        row: dict[str, Any] = {"contender": contender.name, "ours": contender.is_ours, "tokens": tokens}
        call = _admit(contender, encoders, ids, row, exact)
        if call is not None:
            runs[contender.name] = call
        rows.append(row)
    encoders.tell(f"{tokens:,} tokens: timing {len(runs)} encoders in turn")
    timings = interleave(
        {name: lambda own=own: own(ids) for name, own in runs.items()},  # type: ignore[misc]
        budget_s=case.budget_s,
        min_repeats=3 if case.budget_s else 1,
    )
    for row in rows:
        if row["contender"] in timings:
            row.update(timings[row["contender"]].to_dict())
            row["times_faster_than_torch"] = timings[DENSE_TORCH].median_ms / row["median_ms"]
    return rows


def _admit(
    contender: Contender,
    encoders: Encoders,
    ids: npt.NDArray[np.int64],
    row: dict[str, Any],
    exact: dict[str, npt.NDArray[np.float32]],
) -> Call | None:
    """Build a contender and compare its vector; None, with the reason in `row`, when it is not to be timed."""
    if ids.shape[1] > contender.longest:
        row.update(status="skipped", reason=f"not tried beyond {contender.longest:,} tokens")
        return None
    try:
        with quiet():
            call = contender.build(encoders, ids.shape[1])
            found = call(ids)
    except ImplementationError as error:
        row.update(status="skipped", reason=str(error))
        return None
    except (RuntimeError, ValueError, TypeError, ImportError, TrilevelError) as error:
        row.update(status="failed", reason=f"raised {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return None
    if contender.exact not in exact:
        with torch.inference_mode():
            exact[contender.exact] = getattr(encoders, contender.exact)(torch.from_numpy(ids)).numpy()
    wanted = exact[contender.exact]
    cosine = float((found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted))
    row.update(cosine=cosine)
    if not cosine >= contender.cosine:
        row.update(status="failed", reason=f"cosine {cosine:.4f} below {contender.cosine}")
        return None
    row["status"] = "measured"
    return call


def _add_memory(tokens: int, work: Path, rows: list[dict[str, Any]], tell: Callable[[str], None]) -> None:
    rows.append({"contender": MATERIALISED, "ours": False, "tokens": tokens, "status": "memory only"})
    for row in rows:
        if row["tokens"] == tokens and row["contender"] in MEASURED and row["status"] != "skipped":
            tell(f"memory: {row['contender']}")
            try:
                row["peak_process_bytes"] = peak_process_bytes(
                    "trilevel.bench.compression_memory:one_call",
                    row["contender"], str(work), tokens, torch.get_num_threads(),
                    timeout_s=600.0,
                )  # fmt: skip
            except ImplementationError as error:
                row["memory_reason"] = str(error)


def bars(rows: list[dict[str, Any]], settings: dict[str, Any]) -> list[Bar]:
    """The bars of issue 5 on the encoder, at 8,192 tokens.

    Ours is in the runtime that is faster, and so is dense INT8: by NNCF, or by us where NNCF's answers are wrong.
    """
    ms = {(row["contender"], row["tokens"]): row.get("median_ms") for row in rows}
    memory = {row["contender"]: row.get("peak_process_bytes") for row in rows if row["tokens"] == LONG}

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    def fastest(names: Iterable[str]) -> str:
        return min(names, key=lambda name: ms.get((name, LONG)) or math.inf)

    name = fastest(OURS)
    ours, held = ms.get((name, LONG)), memory.get(name)
    dense_int8 = ms.get((fastest([DENSE_OPENVINO, DENSE_OURS]), LONG))
    return [
        Bar(name="speed_8k_vs_torch_fp32", value=ratio(ms.get((DENSE_TORCH, LONG)), ours), op=">=", bar=30),
        Bar(name="speed_8k_vs_openvino_int8", value=ratio(dense_int8, ours), op=">=", bar=15),
        Bar(name="memory_8k_vs_sdpa", value=ratio(held, memory.get(DENSE_TORCH)), op="<=", bar=0.5),
        Bar(name="memory_8k_vs_materialised", value=ratio(held, memory.get(MATERIALISED)), op="<=", bar=0.1),
        Bar(name="int8_share_of_peak", value=settings["int8_share_of_peak"]["share"], op=">=", bar=0.35),
    ]


def compression_table(report: Report) -> Table:
    """Milliseconds of each encoder, how many times faster than dense torch, memory of the process, cosine."""
    from rich.table import Table

    table = Table(title="one document to its vector, MiniLM's size", title_justify="left")
    for column in ("tokens", "encoder", "ms", "times faster than torch", "process, MiB", "cosine to float", ""):
        table.add_column(column, justify="left" if column in ("encoder", "") else "right")
    for row in report.rows:
        shown = [
            f"{row[key]:{form}}" if row.get(key) is not None else ""
            for key, form in (("median_ms", ",.1f"), ("times_faster_than_torch", ".2f"))
        ]
        memory = row.get("peak_process_bytes")
        table.add_row(
            f"{row['tokens']:,}",
            row["contender"],
            *shown,
            f"{memory / 2**20:,.0f}" if memory else "",
            f"{row['cosine']:.4f}" if "cosine" in row else "",
            row.get("reason") or row.get("memory_reason") or "",
        )
    return table
