"""Answers in time under Poisson load: batches by path beside batches that know no paths, and beside a dense peer.

Goodput is the most answers a second within the SLO that a server gives at any of the rates that are offered, each
request counted from when it was to be sent. All servers get the same requests and the same deadline, and what is too
late for it may be refused.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from trilevel.applications.documents.measure import save_encoded
from trilevel.bench.harness import Progress
from trilevel.bench.serving import blind
from trilevel.bench.serving.dense import DenseSpec
from trilevel.bench.serving.environments import SCRIPTS, Made
from trilevel.bench.serving.load import Load, Spec, run_load
from trilevel.bench.serving.own import EngineSpec, start_engine
from trilevel.bench.serving.process import ServerProcess, free_ports
from trilevel.bench.serving.workload import Workload
from trilevel.errors import ImplementationError

AWARE = "batches by path"
ARRIVAL, STATIC, UNBATCHED = "batches by arrival", "static batches of", "no batches"
DENSE = "dense model in LitServe"
# of the full path's time alone: what a user would wait without noticing a queue
_SLO = 8.0
_STEP = 1.25
_FIRST = 0.6
_LAST = 0.9
_MOST_STEPS = 8
_CONNECTIONS = 16
_DENSE_BATCHES = (1, 4)


@final
@dataclass(slots=True, kw_only=True)
class Contender:
    """A server and what it was seen to answer.

    Attributes:
        name: for the table.
        server: that answers.
        workload: that it gets.
        slo_s: within which an answer counts.
        best: the load of the rate at which it answered most in time.
        seen: goodput by rate.
    """

    name: str
    server: ServerProcess
    workload: Workload
    slo_s: float
    best: Load | None = None
    seen: dict[float, float] = field(default_factory=dict)

    def spec(self, **options: Any) -> Spec:
        """Of a load of it."""
        path = f"/v2/models/{self.workload.name}/infer"
        return Spec(port=self.server.port, path=path, headers=self.workload.headers, **options)

    @property
    def goodput(self) -> float:
        """Answers a second."""
        return max(self.seen.values(), default=0.0)

    @property
    def is_over(self) -> bool:
        """Whether a higher rate would only show less."""
        values = list(self.seen.values())
        return (len(values) >= 2 and max(values[-2:]) < _LAST * max(values)) or len(values) >= _MOST_STEPS

    def offered(self, rate: float, seconds: float, seed: int) -> None:
        """Send at a rate, with deadlines."""
        spec = self.spec(rate=rate, seconds=seconds, deadline_s=self.slo_s, connections=_CONNECTIONS, seed=seed)
        with self.server.running():
            load = run_load(spec, self.workload.bodies)
        found = load.goodput(self.slo_s)
        if found >= self.goodput:
            self.best = load
        self.seen[rate] = found

    def row(self) -> dict[str, Any]:
        """Of the table."""
        best = self.best
        return {
            "workload": self.workload.name,
            "server": self.name,
            "slo_ms": 1e3 * self.slo_s,
            "goodput": self.goodput,
            "at_rate": max(self.seen, key=lambda rate: self.seen[rate]) if self.seen else None,
            "p50_ms": None if best is None else best.percentile_ms(50),
            "p99_ms": None if best is None else best.percentile_ms(99),
            "seen": {f"{rate:.3g}": round(value, 3) for rate, value in self.seen.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """What was found; `broken` names servers of ours that gave wrong answers."""

    rows: list[dict[str, Any]]
    broken: list[str]

    def best(self, *names: str) -> float | None:
        """The most goodput of the servers whose names begin with one of these."""
        return max((row["goodput"] for row in self.rows if row["server"].startswith(names)), default=None)

    def ratio(self, *others: str) -> float | None:
        """Ours over the best of others; None where one of them was not measured."""
        own, theirs = self.best(AWARE), self.best(*others)
        return own / theirs if own is not None and theirs else None


def measure_goodput(
    workload: Workload,
    progress: Progress,
    *,
    instances: int,
    seconds: float,
    sizes: Sequence[int] = (4, 16),
    then: Callable[[Contender], None] = lambda _: None,
) -> Goodput:
    """Servers with and without knowledge of paths, at the same rates in turn; ours alone where there are no paths.

    Args:
        workload: what is sent.
        progress: told of it.
        instances: worker processes of each server, a thread each.
        seconds: at each rate.
        sizes: of static batches.
        then: called with ours while it is there.
    """
    slo_s = _SLO * workload.full_ms / 1e3
    common: dict[str, Any] = {"folder": str(workload.folder), "name": workload.name, "instances": instances}
    kinds: dict[str, dict[str, Any]] = {AWARE: {"slo_s": slo_s}}
    if workload.is_routed:
        unaware = {"opener": blind.OPENER}
        kinds[ARRIVAL] = {**unaware, "slo_s": slo_s}
        kinds[UNBATCHED] = {**unaware, "max_batch": 1}
        for size in sizes:
            # a batch that never fills must still be answered in time
            kinds[f"{STATIC} {size}"] = {**unaware, "max_batch": size, "max_wait_s": slo_s / 2}
    with _started(kinds, common, workload, slo_s, progress) as contenders:
        broken = [one.name for one in contenders if not _is_right(one)]
        good = [one for one in contenders if one.name not in broken]
        if AWARE in broken:
            return Goodput(rows=[one.row() for one in contenders], broken=broken)
        rate = _FIRST * _capacity(good[0], seconds / 2)
        for step in range(_MOST_STEPS):
            for one in good:
                if not one.is_over:
                    progress(f"{workload.name}: {one.name}, {rate:.3g}/s", step / _MOST_STEPS)
                    one.offered(rate, seconds, step)
            rate *= _STEP
        then(good[0])
        return Goodput(rows=[one.row() for one in contenders], broken=broken)


@contextlib.contextmanager
def _started(
    kinds: dict[str, dict[str, Any]], common: dict[str, Any], workload: Workload, slo_s: float, progress: Progress
) -> Iterator[list[Contender]]:
    found: list[Contender] = []
    try:
        for name, options in kinds.items():
            progress(f"{workload.name}: starting {name}", 0.0)
            server = start_engine(EngineSpec(**common, **options, port=free_ports(1)[0]))
            server.pause()
            found.append(Contender(name=name, server=server, workload=workload, slo_s=slo_s))
        yield found
    finally:
        for one in found:
            one.server.stop()


def _is_right(one: Contender) -> bool:
    """Whether answers in the batches of many clients are those that each request gets alone."""
    with one.server.running():
        spec = one.spec(connections=_CONNECTIONS, seconds=max(1.0, 4 * one.slo_s), keeps=True)
        load = run_load(spec, one.workload.bodies)
    knows_paths = one.name == AWARE and one.workload.is_routed
    wrong = one.workload.wrong(load.body.tolist(), load.replies, with_paths=knows_paths)
    return len(load) > 0 and bool(load.is_ok.all()) and not wrong


def _capacity(one: Contender, seconds: float) -> float:
    """Answers a second where as many clients as make full batches wait for nothing but their answers."""
    with one.server.running():
        load = run_load(one.spec(connections=_CONNECTIONS, seconds=seconds), one.workload.bodies)
    return float(load.is_ok.sum()) / float(np.nanmax(load.done))


def measure_dense(
    workload: Workload, peer: Made, work: Path, progress: Progress, *, workers: int, seconds: float
) -> list[dict[str, Any]]:
    """What LitServe answers with a dense model, each batch size a row: answers a second, whatever they take.

    This is more than its goodput at any SLO, for clients that wait for their answers never queue.
    """
    folder, found = Path(tempfile.mkdtemp(dir=work)), []
    for number, inputs in enumerate(workload.inputs):
        np.savez(folder / f"{number}.npz", **dict(inputs))  # type: ignore[arg-type]
    for number, document in enumerate(workload.documents):
        save_encoded(folder / f"{number}.npz", document)
    bodies = [b'{"sample": %d}' % number for number in range(len(workload.inputs))]
    for size in _DENSE_BATCHES:
        name, port = f"{DENSE}, batches of {size}", free_ports(1)[0]
        progress(f"{workload.name}: {name}", 0.0)
        spec = DenseSpec(
            samples=str(folder), artifact=None if workload.documents else str(workload.folder), max_batch=size,
            workers=workers,
        )  # fmt: skip
        command = [str(peer.python), str(SCRIPTS / "litserve_dense.py"), str(port), spec.to_json()]
        row = {"workload": workload.name, "server": name, "goodput": 0.0}
        try:
            server = ServerProcess(command, peer.peer.ready, port)
        except ImplementationError as error:
            found.append({**row, "status": f"not started: {error}"})
            continue
        try:
            connections = workers * 2 * size
            asked = Spec(port=port, path="/predict", connections=connections, seconds=seconds, timeout_s=300.0)
            load = run_load(asked, bodies)
        finally:
            server.stop()
        if not load.is_ok.any():
            found.append({**row, "status": f"no answers: {load.counts()}"})
            continue
        rate = float(load.is_ok.sum()) / float(np.nanmax(load.done))
        found.append({**row, "goodput": rate, "p50_ms": load.percentile_ms(50), "p99_ms": load.percentile_ms(99)})
    return found
