"""`trilevel bench serving`: costs beside other servers, answers in time under load, and what breaks lose."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trilevel.applications.documents.artifact import INT8
from trilevel.bench.harness import Bar, Progress, Report
from trilevel.bench.serving.cost import OURS, measure_cost
from trilevel.bench.serving.environments import PEERS, Made, find
from trilevel.bench.serving.faults import measure_faults
from trilevel.bench.serving.goodput import (
    ARRIVAL,
    DENSE,
    STATIC,
    Contender,
    Goodput,
    measure_dense,
    measure_goodput,
)
from trilevel.bench.serving.pressure import OVERLOAD, SOAK_SHARE, Pressure, press, pressure_bars
from trilevel.bench.serving.workload import Workload, open_workload
from trilevel.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("cost", "goodput", "faults")
_LITSERVE = "litserve"
_OVERLOAD, _SOAK = "three times too much", "70% for long"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCase:
    """What is measured.

    Args:
        tasks: artifacts and their data, of `trilevel route`; the summariser that ships is always there.
        parts: of `PARTS`.
        installs: whether peers that are not there are installed.
        instances: worker processes of each server, a thread each.
        seconds: of each load.
        overload_s: at three times what can be answered.
        soak_minutes: at 70%; 0 for none.
        requests: that differ, of each workload.
        rounds: of the costs.
        kills, reloads, drains: see `measure_faults`.
        has_bars: whether figures are judged; else only that answers are right.
    """

    tasks: Sequence[tuple[Path, Path | None]] = ((INT8, None),)
    parts: Sequence[str] = PARTS
    installs: bool = False
    instances: int = 2
    seconds: float = 15.0
    dense_s: float = 60.0
    overload_s: float = 60.0
    soak_minutes: float = 0.0
    requests: int = 100
    rounds: int = 3
    kills: int = 50
    reloads: int = 20
    drains: int = 10
    has_bars: bool = True

    def __post_init__(self) -> None:
        """Check the parts."""
        if unknown := set(self.parts) - set(PARTS):
            raise InputError(f"--part {', '.join(sorted(unknown))} is unknown; choose from {', '.join(PARTS)}.")

    @staticmethod
    def smoke() -> ServingCase:
        """Seconds long, the correctness of all parts without bars."""
        return ServingCase(
            seconds=1.0, dense_s=1.0, overload_s=2.0, requests=4, rounds=1, kills=2, reloads=1, drains=1,
            instances=1, has_bars=False,
        )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class _Found:
    """What the parts add to."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def figure(self, what: str, server: str, value: float | None, unit: str) -> None:
        """A row of the table."""
        if value is not None:
            self.rows.append({"what": what, "server": server, "value": value, "unit": unit})


def run(case: ServingCase, progress: Progress) -> Report:
    """Measure all parts.

    Raises:
        InputError: the system is not Linux, or an artifact or its data cannot be used.
        ArtifactError: an artifact is damaged.
        ImplementationError: a server of ours does not start, or ends.
    """
    if not sys.platform.startswith("linux"):
        raise InputError("the processes of servers can be looked at on Linux alone; run this there.")
    peers, absent = find(list(PEERS), make=case.installs)
    for name, reason in absent.items():
        sys.stderr.write(f"peer {name} is left out: {reason}\n")
    found = _Found()
    with tempfile.TemporaryDirectory(prefix="trilevel-bench-") as name:
        work = Path(name)
        # an artifact that cannot be used is told of before anything is measured
        opened = [open_workload(*task, case.requests) for task in case.tasks] if "goodput" in case.parts else []
        if "cost" in case.parts:
            _costs(case, work, peers, progress, found)
        if "goodput" in case.parts:
            _goodputs(case, work, opened, peers, progress, found)
        if "faults" in case.parts:
            _faults(case, work, progress, found)
    return Report(
        case="serving",
        rows=found.rows,
        bars=found.bars if case.has_bars else [],
        settings={
            "parts": list(case.parts),
            "instances": case.instances,
            "seconds": case.seconds,
            "peers": {made.peer.name: list(made.peer.packages) for made in peers},
            "absent": absent,
        },
        measurements=found.details,
        broken=found.broken,
    )


def _costs(case: ServingCase, work: Path, peers: Sequence[Made], progress: Progress, found: _Found) -> None:
    cost = measure_cost(work, peers, progress, rounds=case.rounds, seconds=case.seconds / 3)
    for row in cost.rows:
        server, protocol = row["server"], row["protocol"]
        if "cpu_us" not in row:
            sys.stderr.write(f"{server} {protocol}: {row['status']}\n")
            continue
        found.figure(f"processor time a request, {protocol}, 16 connections", server, row["cpu_us"], "us")
        found.figure(f"p50 of one client, {protocol}", server, row["alone_p50_ms"], "ms")
    found.figure("start until ready", OURS, cost.start_s, "s")
    found.bars += cost.bars()
    found.details += cost.rows
    found.broken += cost.broken


def _goodputs(
    case: ServingCase,
    work: Path,
    opened: Sequence[Workload],
    peers: Sequence[Made],
    progress: Progress,
    found: _Found,
) -> None:
    measured, pressures = [], list[Pressure]()
    litserve = next((made for made in peers if made.peer.name == _LITSERVE), None)
    for workload in opened:
        goodput = measure_goodput(
            workload,
            progress,
            instances=case.instances,
            seconds=case.seconds,
            then=lambda one: pressures.extend(_pressed(case, one, progress)),
        )
        if litserve is not None:
            goodput.rows.extend(
                measure_dense(workload, litserve, work, progress, workers=case.instances, seconds=case.dense_s)
            )
        for row in goodput.rows:
            if "status" in row:
                sys.stderr.write(f"{row['server']}: {row['status']}\n")
            found.figure(f"{workload.name}: answers in time", row["server"], row["goodput"], "a second")
        measured.append((workload, goodput))
        found.details += goodput.rows
        found.broken += [f"{workload.name}: {one}" for one in goodput.broken]
    for pressure in pressures:
        what = f"{pressure.workload}: {pressure.name}"
        found.figure(f"{what}, answers in time over the peak", OURS, pressure.share, "")
        found.figure(f"{what}, memory at its end over that before", OURS, pressure.memory.ratio, "")
        found.details.append(pressure.row())
    found.bars += _goodput_bars(measured)
    worst = {name: [one for one in pressures if one.name == name] for name in (_OVERLOAD, _SOAK)}
    found.bars += pressure_bars(worst[_OVERLOAD], worst[_SOAK], has_soak=case.soak_minutes > 0)


def _pressed(case: ServingCase, one: Contender, progress: Progress) -> Iterator[Pressure]:
    """Too much, and some for long, on a server whose peak is known."""
    yield press(one, _OVERLOAD, OVERLOAD * one.goodput, case.overload_s, progress)
    if case.soak_minutes:
        yield press(one, _SOAK, SOAK_SHARE * one.goodput, 60 * case.soak_minutes, progress)


def _goodput_bars(measured: Sequence[tuple[Workload, Goodput]]) -> list[Bar]:
    """The least of the artifacts with paths, and the summariser's."""
    blind = [own.ratio(ARRIVAL, STATIC) for workload, own in measured if workload.is_routed]
    dense = [own.ratio(DENSE) for workload, own in measured if workload.documents]

    def least(ratios: Sequence[float | None]) -> float | None:
        known = [ratio for ratio in ratios if ratio is not None]
        return min(known) if known and len(known) == len(ratios) else None

    return [
        Bar(name="goodput_vs_path_blind", value=least(blind), op=">=", bar=1.4),
        Bar(name="goodput_vs_peer_dense", value=least(dense), op=">=", bar=5),
    ]


def _faults(case: ServingCase, work: Path, progress: Progress, found: _Found) -> None:
    faults = measure_faults(work, progress, kills=case.kills, reloads=case.reloads, drains=case.drains)
    for one in faults:
        what = f"{one.times} times {one.name}, {one.requests} requests"
        found.figure(f"{what}: lost", OURS, one.lost, "requests")
        found.figure(f"{what}: answered twice or wrongly", OURS, one.twice, "requests")
        found.details.append(one.row())
    lost = sum(one.lost + one.twice for one in faults)
    found.bars.append(Bar(name="requests_lost", value=float(lost), op="<=", bar=0))
    found.broken += [f"faults: {one.name}" for one in faults if one.twice]


def parse_task(text: str) -> tuple[Path, Path | None]:
    """An artifact and its data from `ARTIFACT=DATA`, or the summariser's artifact alone.

    >>> parse_task("out/paths/fashion=images/fashion_mnist.npz")
    (PosixPath('out/paths/fashion'), PosixPath('images/fashion_mnist.npz'))
    """
    artifact, equals, data = text.partition("=")
    if not artifact or (equals and not data):
        raise InputError(f"--task {text}: write ARTIFACT=DATA, or ARTIFACT of a summariser.")
    return Path(artifact), Path(data) if data else None


def serving_table(report: Report) -> Table:
    """All figures, a line each."""
    from rich.table import Table

    table = Table(title="serving", title_justify="left")
    for column in ("what", "server", "value", "unit"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in report.rows:
        table.add_row(row["what"], row["server"], f"{row['value']:.4g}", row["unit"])
    return table
