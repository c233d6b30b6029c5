"""The client: what it sends and reads, when it asks again, and that its time is for everything."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest

from tests.serving.fake_engine import FakeEngine, looped, served
from tests.serving.rest_client import Lengths
from trilevel.client import AsyncClient, BusyError, CallError, Client, FailedError, LateError, RefusedError, Retry
from trilevel.client.attempts import Answer, Ask, Lost, Sleep, conversation
from trilevel.errors import ConfigError, InputError
from trilevel.serving.front import Front
from trilevel.serving.keys import Keys, new_key
from trilevel.serving.requests import DeadlineError, OverloadedError, UnavailableError, WorkerError
from trilevel.serving.server import run

X = np.array([[1.5, -2, 3], [4, 5, 6]], np.float32)
QUICK = Retry(attempts=3, base_s=0.001, cap_s=0.002)


@contextmanager
def server_in_a_thread(engine: FakeEngine, **given: Any) -> Iterator[str]:
    """The address of a server that runs beside the test."""
    ready, ports = threading.Event(), []
    ends: list[Any] = []

    async def work() -> None:
        async with served(engine, **given) as server:
            over = asyncio.Event()
            ends.append((asyncio.get_running_loop(), over))
            ports.append(server.rest_port)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: run(work()))
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop, over = ends[0]
        loop.call_soon_threadsafe(over.set)
        thread.join(10)


@asynccontextmanager
async def asking(engine: FakeEngine, **given: Any) -> AsyncIterator[AsyncClient]:
    """A client of a server that it has for itself."""
    async with (
        served(engine, tasks={"lengths": Lengths()}) as server,
        AsyncClient(f"http://127.0.0.1:{server.rest_port}", **given) as client,
    ):
        yield client


def test_the_client_without_an_event_loop() -> None:
    engine = FakeEngine()
    with server_in_a_thread(engine, tasks={"lengths": Lengths()}) as url, Client(url, retry=QUICK) as client:
        got = client.infer("double", {"x": X}, is_explained=True, priority=3, max_loss=0.5, request_id="7")
        np.testing.assert_array_equal(got.outputs["y"], X * 2)
        assert got.outputs["y"].flags.writeable
        assert (got.model, got.version, got.id) == ("double", "2", "7")
        assert (got.paths, got.milliseconds["compute"]) == (("int8/2", "float32/6"), 2.0)
        assert got.explanations == ({"row": 0}, {"row": 1})
        asked = engine.requests[-1]
        assert (asked.priority, asked.max_loss, asked.is_explained) == (3, 0.5, True)
        got = client.infer("double", {"x": X}, version="1", outputs=["sum"])
        assert (list(got.outputs), got.version) == (["sum"], "1")
        texts = {
            "text": np.array(["ä", b"\xff"], object),
            "ids": np.ones((2, 5), np.int64),
            "is": np.array([True, False]),
        }
        assert client.infer("texts", texts).outputs["text"].tolist() == ["ä".encode(), b"\xff"]
        assert client.task("lengths", {"text": "abc"})["twice"] == 6.0
        assert client.task("lengths", b"ab", content_type="text/plain", parameters={"model": "double"})["twice"] == 4.0
        assert client.is_ready()
        assert [one["name"] for one in client.models()] == ["double", "double", "texts"]
        assert client.metadata("double", "1")["platform"] == "trilevel"
        client.load("double")
        client.unload("double")
        assert engine.loads == ["+double", "-double"]
        with pytest.raises(RefusedError, match="404: no model 'a/b'") as caught:
            client.infer("a/b", {"x": X})
        assert caught.value.status == 404
        assert caught.value.request_id
        with pytest.raises(InputError, match="input 'x' is complex64; send one of bool"):
            client.infer("double", {"x": X + 1j})


@looped
async def test_the_client_with_an_event_loop() -> None:
    engine = FakeEngine()
    async with asking(engine, retry=QUICK) as client:
        sent = [np.full((1, 3), number, np.float32) for number in range(23)]
        got = await asyncio.gather(*[client.infer("double", {"x": one}) for one in sent])
        assert [one.outputs["y"][0, 0] for one in got] == [2 * number for number in range(23)]
        assert (await client.task("lengths", {"text": "abc"}))["path"] == "int8/2"
        assert await client.is_ready()
        assert len(await client.models()) == 3
        assert (await client.metadata("double"))["versions"] == ["1", "2"]
        await client.load("double")
        await client.unload("double")
        with pytest.raises(RefusedError, match="400: input 'x' of model 'double' is FP32; FP64"):
            await client.infer("double", {"x": X.astype(float)})


@pytest.mark.parametrize(
    ("error", "kind", "asked"),
    [
        (OverloadedError("busy", retry_after_s=0.001), BusyError, 3),
        (UnavailableError("loads"), BusyError, 1),
        (WorkerError("died twice"), FailedError, 1),
        (DeadlineError("late"), LateError, 1),
        (InputError("odd"), RefusedError, 1),
    ],
)
@looped
async def test_what_is_asked_again(error: Exception, kind: type[CallError], asked: int) -> None:
    engine = FakeEngine()
    engine.error = error
    # 503 says to come back after a second, which is more than there is
    async with asking(engine, retry=QUICK, timeout_s=0.8) as client:
        with pytest.raises(kind, match=str(error)):
            await client.infer("double", {"x": X})
    assert len(engine.requests) == asked


@looped
async def test_keys() -> None:
    key, line = new_key("alice")
    engine = FakeEngine()
    front = Front(engine, keys=Keys({line.split()[0].removeprefix("sha256:"): "alice"}))
    async with served(engine, front=front) as server:
        url = f"http://127.0.0.1:{server.rest_port}"
        async with AsyncClient(url, key=key) as client:
            await client.models()
        async with AsyncClient(url) as client:
            with pytest.raises(RefusedError, match="401: an API key is needed"):
                await client.models()


@looped
async def test_time_is_for_everything() -> None:
    engine = FakeEngine(delay_s=5)
    async with asking(engine, timeout_s=30) as client:
        started = time.monotonic()
        with pytest.raises(LateError):
            await client.infer("double", {"x": X}, timeout_s=0.15)
        assert time.monotonic() - started < 1
        deadline = engine.requests[0].deadline
        assert deadline is not None
        assert deadline - started == pytest.approx(0.15, abs=0.1)


def test_nobody_at_home() -> None:
    with Client("http://127.0.0.1:9", retry=QUICK) as client:
        assert not client.is_ready()
        with pytest.raises(FailedError, match=r"no answer came \(ConnectError.*is the server at this address"):
            client.models()
    with pytest.raises(ConfigError, match=r"url='127.0.0.1:8000' must begin with http://"):
        Client("127.0.0.1:8000")


def led(answers: list[Answer | Lost], **given: Any) -> tuple[Any, list[Ask | Sleep]]:
    """What a conversation ends with, and what it asked for; waits take time by a clock of its own."""
    now, steps, left = [100.0], [], iter(answers)
    talk = conversation("POST", "/", **{"retry": Retry(), "timeout_s": 10.0, "clock": lambda: now[0], **given})
    got: Answer | Lost | None = None
    try:
        while True:
            step = talk.send(got)
            steps.append(step)
            got = None
            if isinstance(step, Sleep):
                now[0] += step.seconds
            else:
                now[0] += 0.5
                got = next(left)
    except StopIteration as end:
        return end.value, steps
    except CallError as error:
        return error, steps


def answer(status: int, **headers: str) -> Answer:
    return Answer(
        status=status,
        body=b'{"error": "no"}',
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def test_each_attempt_has_what_time_is_left() -> None:
    got, steps = led([answer(503), answer(429), answer(200)])
    assert got.status == 200
    asks = [step for step in steps if isinstance(step, Ask)]
    waits = [step.seconds for step in steps if isinstance(step, Sleep)]
    assert asks[0].timeout_s == 10.0
    assert asks[1].timeout_s == pytest.approx(9.5 - waits[0])
    assert asks[2].timeout_s == pytest.approx(9.0 - sum(waits))
    assert int(asks[2].headers["X-Request-Timeout-Ms"]) == int((asks[2].timeout_s or 0) * 1000)


def test_waits_are_drawn_in_full_and_no_shorter_than_the_server_says() -> None:
    retry = Retry(base_s=0.1, cap_s=1.0)
    drawn = [retry.wait_s(attempt, None, lambda: 1.0) for attempt in (1, 2, 3, 9)]
    assert drawn == [0.2, 0.4, 0.8, 1.0]
    assert retry.wait_s(9, None, lambda: 0.0) == 0.0
    assert retry.wait_s(1, 3.0, lambda: 0.0) == 3.0
    got, steps = led([answer(429, retry_after="2"), answer(200)])
    assert got.status == 200
    assert isinstance(steps[1], Sleep)
    assert steps[1].seconds >= 2


def test_no_wait_ends_after_the_deadline() -> None:
    got, steps = led([answer(429, retry_after="20")])
    assert isinstance(got, BusyError)
    assert (got.retry_after_s, len(steps)) == (20.0, 1)


def test_lost_requests_are_sent_again_only_where_that_is_safe() -> None:
    lost = Lost(reason="ReadError", is_late=False)
    got, steps = led([lost, answer(200)])
    assert (got.status, len(steps)) == (200, 3)
    got, steps = led([lost], is_repeatable=False)
    assert (type(got), len(steps)) == (FailedError, 1)
    got, steps = led([Lost(reason="ReadTimeout", is_late=True)])
    assert (type(got), len(steps)) == (LateError, 1)
    got, _ = led([answer(503)] * 9, timeout_s=None, retry=Retry(attempts=5))
    assert isinstance(got, BusyError)
    got, _ = led([Answer(status=500, body=b"<html>", headers={})])
    assert str(got) == "500: <html>"


def test_retries_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="attempts must be 1 or more"):
        Retry(attempts=0)
