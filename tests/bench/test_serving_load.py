"""The load generator of `trilevel bench serving`: Poisson's times, and nothing that a server delays is left out."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from trilevel.bench.serving.load import LOST, NOT_ACCEPTED, Load, Spec, load_bytes, poisson, run_load, save_bytes
from trilevel.bench.serving.process import free_ports

STALL_S = 0.6
RATE = 150.0
Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


@contextmanager
def server(answer: Answer) -> Iterator[int]:
    """A port of HTTP where each request is answered by a function."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer(self, self.rfile.read(int(self.headers["content-length"])))

        def log_message(self, *_: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield found.server_port
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def echo(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(len(body)))
    handler.send_header("x-request-id", handler.headers["x-request-id"])
    handler.end_headers()
    handler.wfile.write(body)


def stalling(at_s: float) -> Answer:
    """Answers at once, but for one time at which everything stands still."""
    started, until = time.monotonic(), threading.Lock()

    def answer(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        since = time.monotonic() - started - at_s
        if 0 <= since < STALL_S:
            time.sleep(STALL_S - since)
        with until:
            echo(handler, body)

    return answer


def test_gaps_are_exponential_and_independent() -> None:
    times = poisson(70.0, 300.0, np.random.default_rng(0))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(70 * 300, rel=0.03)
    assert (gaps >= 0).all()
    assert times[-1] < 300
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.05)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    # counts in windows vary as much as they are large
    counts = np.histogram(times, bins=300)[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.25)
    np.testing.assert_array_equal(times, poisson(70.0, 300.0, np.random.default_rng(0)))


def test_a_server_that_stands_still_is_charged_for_all_that_fell_into_that_time() -> None:
    with server(stalling(1.6)) as port:
        load = run_load(Spec(port=port, path="/", rate=RATE, seconds=2.5, connections=8), [b"x"])
    with server(stalling(1.6)) as port:
        closed = run_load(Spec(port=port, path="/", seconds=2.5, connections=1), [b"x"])
    assert load.is_ok.all()
    assert len(load) == pytest.approx(RATE * 2.5, rel=0.3)
    # what came in the first two thirds of the stall waited longer than a third of it
    late = int((load.latencies > STALL_S / 3).sum())
    assert late >= 0.6 * RATE * STALL_S * 2 / 3
    assert load.percentile_ms(90) is not None
    assert load.percentile_ms(90) > 1e3 * STALL_S / 5  # type: ignore[operator]
    # a closed loop notices one request of many
    assert int((closed.latencies > STALL_S / 3).sum()) <= 2
    assert closed.percentile_ms(90) < 1e3 * STALL_S / 5  # type: ignore[operator]


def test_a_generator_that_is_late_charges_itself() -> None:
    load = Load(
        intended=np.array([0.0, 1.0]),
        sent=np.array([0.5, 1.0]),
        done=np.array([0.6, 1.1]),
        status=np.array([200, 200]),
        body=np.array([0, 0]),
        seconds=2.0,
    )
    assert load.latencies.tolist() == pytest.approx([0.6, 0.1])
    assert load.goodput(0.2) == 0.5
    assert load.percentile_ms(100) == pytest.approx(600)


def test_what_is_not_answered_is_lost_and_what_is_not_taken_is_not() -> None:
    def closes_some(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        if body == b"lost":
            handler.close_connection = True
        else:
            echo(handler, body)

    with server(closes_some) as port:
        load = run_load(Spec(port=port, path="/", rate=60.0, seconds=0.7, keeps=True), [b"lost", b"kept"])
    assert load.num_lost == int((load.body == 0).sum()) > 0
    assert set(load.status[load.body == 1].tolist()) == {200}
    replies = {reply for reply, ok in zip(load.replies, load.is_ok, strict=True) if ok}
    assert replies == {b"kept"}
    refused = run_load(Spec(port=free_ports(1)[0], path="/", rate=40.0, seconds=0.3, is_fresh=True), [b"x"])
    assert set(refused.status.tolist()) == {NOT_ACCEPTED}
    assert (refused.num_lost, refused.percentile_ms(50)) == (0, None)
    assert refused.counts() == {"not accepted": len(refused)}


def test_an_answer_that_comes_twice_or_to_another_request_is_counted() -> None:
    def twice(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        echo(handler, body)
        if body == b"twice":
            echo(handler, body)

    def swapped(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        handler.headers.replace_header("x-request-id", "another")
        echo(handler, body)

    for answer, bodies in ((twice, [b"twice", b"once"]), (swapped, [b"x"])):
        with server(answer) as port:
            load = run_load(Spec(port=port, path="/", rate=50.0, seconds=0.5, is_fresh=True), bodies)
        # of the last ones the second answer may come when nobody listens any more
        assert load.num_extra >= 0.8 * (load.body == 0).sum() > 0
    with server(echo) as port:
        assert run_load(Spec(port=port, path="/", rate=50.0, seconds=0.3), [b"x"]).num_extra == 0


def test_an_answer_that_never_comes_is_given_up() -> None:
    over = threading.Event()

    def never(handler: http.server.BaseHTTPRequestHandler, body: bytes) -> None:
        over.wait(5)

    with server(never) as port:
        load = run_load(Spec(port=port, path="/", rate=20.0, seconds=0.2, timeout_s=0.3), [b"x"])
        over.set()
    assert set(load.status.tolist()) == {LOST}
    assert np.isnan(load.done).all()


def test_bytes_without_pickles(tmp_path: Path) -> None:
    file = tmp_path / "bytes.npz"
    for values in ([b"abc", b"", b"\x00"], [b""]):
        save_bytes(file, values)
        assert load_bytes(file) == values
