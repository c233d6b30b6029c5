"""What a server costs when its model costs nothing: processor time a request, and time added to one request."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trilevel.bench.harness import Bar, Progress
from trilevel.bench.serving.environments import INFER, RPC, Made
from trilevel.bench.serving.load import Protocol, Spec, run_load
from trilevel.bench.serving.own import start_command
from trilevel.bench.serving.process import ServerProcess, free_ports
from trilevel.bench.serving.trivial import (
    NAME,
    is_right,
    open_inference_grpc,
    open_inference_json,
    rows,
    write_trivial,
)
from trilevel.errors import ImplementationError

OURS = "trilevel"
PROTOCOLS: tuple[Protocol, ...] = ("rest", "grpc")
CONNECTIONS = (1, 16)
_SAMPLES = 512
_WARM_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contender:
    name: str
    server: ServerProcess
    paths: Mapping[Protocol, tuple[int, str]]
    is_python: bool

    def spec(self, protocol: Protocol, **options: Any) -> Spec:
        port, path = self.paths[protocol]
        return Spec(port=port, path=path, protocol=protocol, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What was found.

    Attributes:
        rows: of the table, a server and protocol each.
        broken: of ours, what gave wrong answers.
    """

    rows: list[dict[str, Any]]
    broken: list[str]

    def bars(self) -> list[Bar]:
        """What issue 7 promises."""
        return [
            Bar(name="cpu_us_rest", value=self._of(OURS, "rest", "cpu_us"), op="<=", bar=250),
            Bar(name="cpu_us_grpc", value=self._of(OURS, "grpc", "cpu_us"), op="<=", bar=450),
            Bar(name="overhead_vs_best_python_peer", value=self._overhead(), op="<", bar=1),
        ]

    @property
    def start_s(self) -> float | None:
        """Of ours, from its command until it was ready."""
        return self._of(OURS, "rest", "start_s")

    def _of(self, server: str, protocol: str, column: str) -> float | None:
        found = (row for row in self.rows if (row["server"], row["protocol"]) == (server, protocol))
        value: float | None = next(found, {}).get(column)
        return value

    def _overhead(self) -> float | None:
        """By the protocol in which ours compares worst."""
        ratios = []
        for protocol in PROTOCOLS:
            own = self._of(OURS, protocol, "alone_p50_ms")
            peers = [
                row["alone_p50_ms"]
                for row in self.rows
                if row["protocol"] == protocol and row.get("is_python") and row.get("alone_p50_ms")
            ]
            if own and peers:
                ratios.append(own / min(peers))
        return max(ratios, default=None)


def measure_cost(
    work: Path, peers: Sequence[Made], progress: Progress, *, rounds: int = 3, seconds: float = 3.0
) -> Cost:
    """Ours beside the peers, in turn; each runs while the others stand still.

    Args:
        work: folder for the model.
        peers: whose environments are there.
        progress: told of it.
        rounds: of all, one after the other.
        seconds: of each load.
    """
    table: list[dict[str, Any]] = []
    with _started(work, peers, progress, table) as contenders:
        x = rows(_SAMPLES)
        bodies = {"rest": open_inference_json(x), "grpc": open_inference_grpc(x)}
        fields = [(one, protocol) for one in contenders for protocol in one.paths]
        good, seen = [], dict[tuple[str, Protocol, int], list[tuple[float, float, float]]]()
        for one, protocol in fields:
            with one.server.running():
                spec = one.spec(protocol, connections=16, seconds=_WARM_S, keeps=True)
                load = run_load(spec, bodies[protocol])
            if load.is_ok.all() and is_right(load.body.tolist(), load.replies, x, protocol):
                good.append((one, protocol))
            else:
                row = {"server": one.name, "protocol": protocol, "status": f"wrong answers: {load.counts()}"}
                table.append(row)
        for number in range(rounds):
            for one, protocol in good:
                progress(f"{one.name}, {protocol}", number / rounds)
                for connections in CONNECTIONS:
                    spec = one.spec(protocol, connections=connections, seconds=seconds, seed=number)
                    with one.server.running():
                        before = one.server.cpu_s
                        load = run_load(spec, bodies[protocol])
                        used = one.server.cpu_s - before
                    count = max(1, int(load.is_ok.sum()))
                    found = (1e6 * used / count, load.percentile_ms(50) or 0.0, count / seconds)
                    seen.setdefault((one.name, protocol, connections), []).append(found)
        for one, protocol in good:
            table.append(_row(one, protocol, seen))
    broken = [f"{row['server']}, {row['protocol']}" for row in table if row["server"] == OURS and "cpu_us" not in row]
    return Cost(rows=table, broken=broken)


def _row(
    one: _Contender, protocol: Protocol, seen: Mapping[tuple[str, Protocol, int], list[tuple[float, float, float]]]
) -> dict[str, Any]:
    alone, many = (
        [statistics.median(values) for values in zip(*seen[one.name, protocol, connections], strict=True)]
        for connections in CONNECTIONS
    )
    return {
        "server": one.name,
        "protocol": protocol,
        "status": "measured",
        "cpu_us": many[0],
        "requests_s": many[2],
        "alone_cpu_us": alone[0],
        "alone_p50_ms": alone[1],
        "start_s": one.server.started_s,
        "is_python": one.is_python,
    }


@contextlib.contextmanager
def _started(
    work: Path, peers: Sequence[Made], progress: Progress, table: list[dict[str, Any]]
) -> Iterator[list[_Contender]]:
    """All that can be started; why the others cannot stands in the table."""
    found: list[_Contender] = []
    try:
        progress(OURS, 0.0)
        folder = work / NAME
        write_trivial(folder)
        server, grpc_port = start_command(folder, NAME)
        paths: dict[Protocol, tuple[int, str]] = {"rest": (server.port, INFER), "grpc": (grpc_port, RPC)}
        # ours is not its own peer
        found.append(_Contender(name=OURS, server=server, paths=paths, is_python=False))
        server.pause()
        for made in peers:
            progress(made.peer.name, 0.0)
            try:
                found.append(_peer(made, work))
            except (ImplementationError, OSError, StopIteration) as error:
                table.append({"server": made.peer.name, "protocol": "", "status": f"not started: {error}"})
                continue
            found[-1].server.pause()
        yield found
    finally:
        for one in found:
            one.server.stop()


def _peer(made: Made, work: Path) -> _Contender:
    port, grpc_port = free_ports(2)
    command, environment = made.command(port, grpc_port, work)
    server = ServerProcess(command, made.peer.ready, port, environment)
    paths: dict[Protocol, tuple[int, str]] = {"rest": (port, made.peer.rest)}
    if made.peer.has_grpc:
        paths["grpc"] = (grpc_port, RPC)
    return _Contender(name=made.peer.name, server=server, paths=paths, is_python=made.peer.is_python)
