"""The engine with real processes and a model that is none: nothing is lost, swapped or answered twice."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.fake_model import (
    BOUND,
    INPUT_ERROR,
    KILLS,
    KILLS_LATER,
    OPENER,
    OTHER_ERROR,
    PATHS,
    SLEEPS,
    STOPS,
    expected,
    pixels,
    request,
    write_fake,
)
from trilevel.errors import ArtifactError, InputError
from trilevel.serving.batching import BatchingConfig
from trilevel.serving.catalog import Source
from trilevel.serving.engine import EngineConfig, LocalEngine
from trilevel.serving.observer import Nobody
from trilevel.serving.opener import version_of
from trilevel.serving.pool import PoolConfig
from trilevel.serving.requests import (
    DeadlineError,
    Engine,
    OverloadedError,
    Reply,
    Request,
    UnavailableError,
    UnknownModelError,
    WorkerError,
)
from trilevel.serving.server import run as run_in_loop


def run(work: Coroutine[Any, Any, None]) -> None:
    # as the server does; the pool's tests run in Python's own event loop
    run_in_loop(asyncio.wait_for(work, 60))


class Told(Nobody):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, int]] = []
        self.restarts = 0
        self.queues: list[tuple[str, int]] = []
        self.live: list[int] = []
        self.audits: list[tuple[int, bool]] = []

    def batch(self, model: str, path: str, rows: int) -> None:
        self.batches.append((path, rows))

    def restarted(self, model: str) -> None:
        self.restarts += 1

    def queue(self, model: str, queue: str, rows: int) -> None:
        self.queues.append((queue, rows))

    def workers(self, model: str, live: int) -> None:
        self.live.append(live)

    def audit(self, model: str, *, samples: int, mean: float, is_alarmed: bool) -> None:
        self.audits.append((samples, is_alarmed))


@asynccontextmanager
async def engine_of(
    folder: Path,
    *,
    told: Told | None = None,
    instances: int = 1,
    batching: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **behaviour: Any,
) -> AsyncIterator[LocalEngine]:
    write_fake(folder / "fake", **behaviour)
    config = EngineConfig(
        pool=PoolConfig(**{"instances": instances, "backoff_s": 0.05, **(pool or {})}),
        batching=BatchingConfig(**(batching or {})),
        opener=OPENER,
        **{"shadow_share": 0.0, **(options or {})},
    )
    async with LocalEngine([Source(name="fake", folder=folder / "fake")], config, told) as engine:
        yield engine


def pids(engine: LocalEngine) -> tuple[int, ...]:
    served = engine._models["fake"].current
    return () if served is None else served.pool.pids


def logits(reply: Reply) -> Any:
    return reply.outputs["logits"]


async def until(is_so: Any, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.01)


# answers


def test_rows_take_their_paths_and_come_back_in_order(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        async with engine_of(tmp_path, told=told) as engine:
            as_protocol: Engine = engine
            depths = [2, 0, 1, 1, 0, 2, 0]
            inputs = {"pixels": np.concatenate([pixels(place, depth=depth) for place, depth in enumerate(depths)])}
            reply = await as_protocol.infer(Request(id="1", model="fake", inputs=inputs))
            assert reply.paths == tuple(PATHS[depth] for depth in depths)
            np.testing.assert_array_equal(logits(reply), [expected(place, depth) for place, depth in enumerate(depths)])
            assert reply.version == engine.model("fake").version
            assert reply.seconds["total"] >= reply.seconds["compute"] > 0
            assert reply.explanations == ()
            # the table was measured up to 8 rows
            assert told.batches == [("int8/1", 7), ("int8/2", 4), ("float32/1", 2)]

    run(work())


def test_answers_among_others_are_those_alone_and_never_swapped(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        async with engine_of(tmp_path, told=told, instances=2, batch_s=0.002) as engine:

            async def ask(number: int) -> None:
                reply = await engine.infer(request(number % 250, depth=number % 3, id=str(number)))
                np.testing.assert_array_equal(logits(reply), [expected(number % 250, number % 3)])
                assert reply.paths == (PATHS[number % 3],)

            await asyncio.gather(*map(ask, range(500)))
            assert max(rows for _, rows in told.batches) > 8

    run(work())


def test_a_loss_below_the_certified_one_takes_the_full_path(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path) as engine:
            assert (await engine.infer(request(3, max_loss=BOUND))).paths == ("int8/1",)
            reply = await engine.infer(request(3, max_loss=BOUND / 2, is_explained=True))
            assert reply.paths == ("float32/1",)
            assert "0.005 at most was asked for, and 0.01 is what is certified" in reply.explanations[0]["said"][0]

    run(work())


def test_why_a_row_took_its_path(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path) as engine:
            (why,) = (await engine.infer(request(3, depth=1, is_explained=True))).explanations
            assert why["path"] == "int8/2"
            assert [(one["path"], one["margin"], one["wanted"]) for one in why["asked"]] == [
                ("int8/1", 0.5, 2.0),
                ("int8/2", 9.0, 2.0),
            ]
            assert (why["ms"], why["full_ms"]) == (2.1, 4.1)
            assert "1.50 more would have ended here" in why["said"][1]
            (why,) = (await engine.infer(request(3, depth=2, is_explained=True))).explanations
            assert (why["path"], why["ms"]) == ("float32/1", pytest.approx(6.2))

    run(work())


def test_without_a_certificate_here_everything_takes_the_full_path(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, is_routed=False) as engine:
            info = engine.model("fake")
            assert (info.state, info.paths, info.reason) == ("READY", ("float32/1",), "nothing is certified")
            assert (await engine.infer(request(3))).paths == ("float32/1",)

    run(work())


def test_inputs_of_another_kind(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "the graph takes"),
        ({"pixels": pixels(1), "more": pixels(1)}, "the graph takes"),
        ({"pixels": pixels(1).astype(np.int64)}, "uint8"),
        ({"pixels": pixels(1)[:, :, :1]}, "has shape"),
        ({"pixels": pixels(1)[:0]}, "at least one"),
        ({"pixels": np.zeros((9, 1, 2, 3), np.uint8)}, "send 8 at most"),
    ]

    async def work() -> None:
        async with engine_of(tmp_path, batching={"max_queue": 8}) as engine:
            for inputs, words in wrong:
                with pytest.raises(InputError, match=words):
                    await engine.infer(Request(id="1", model="fake", inputs=inputs))

    run(work())


# time


def test_a_deadline_that_passes_while_a_row_waits_or_runs(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        async with engine_of(tmp_path, told=told) as engine:
            slow = asyncio.ensure_future(engine.infer(request(1, wish=SLEEPS)))
            await asyncio.sleep(0.05)
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                await engine.infer(request(2, deadline=started + 0.1))
            assert 0.09 < time.monotonic() - started < 0.2
            await slow
            await engine.infer(request(3))
            # the second one was never computed
            assert [rows for _, rows in told.batches] == [1, 1]
            with pytest.raises(DeadlineError):
                await engine.infer(request(1, wish=SLEEPS, deadline=time.monotonic() + 0.1))

    run(work())


def test_a_client_that_goes_away_is_not_computed_for(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        async with engine_of(tmp_path, told=told) as engine:
            slow = asyncio.ensure_future(engine.infer(request(1, wish=SLEEPS)))
            await asyncio.sleep(0.05)
            waiting = [asyncio.ensure_future(engine.infer(request(number))) for number in range(5)]
            await asyncio.sleep(0.05)
            for one in waiting[:4]:
                one.cancel()
            await asyncio.gather(slow, *waiting, return_exceptions=True)
            np.testing.assert_array_equal(logits(waiting[4].result()), [expected(4)])
            assert [rows for _, rows in told.batches] == [1, 1]
            # one that runs is dropped behind its segment
            running = asyncio.ensure_future(engine.infer(request(1, wish=SLEEPS, depth=2)))
            await asyncio.sleep(0.05)
            running.cancel()
            await engine.infer(request(3))
            assert [path for path, _ in told.batches] == ["int8/1"] * 3 + ["int8/2", "int8/1"]

    run(work())


def test_more_than_may_wait_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, batching={"max_queue": 4}) as engine:
            slow = asyncio.ensure_future(engine.infer(request(1, wish=SLEEPS)))
            await asyncio.sleep(0.05)
            asked = [asyncio.ensure_future(engine.infer(request(number))) for number in range(9)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [isinstance(one, OverloadedError) for one in found] == [False] * 4 + [True] * 5
            await slow

    run(work())


# faults


def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        async with engine_of(tmp_path, told=told, instances=2, row_s=0.001) as engine:
            answers: dict[int, int] = {}

            async def ask(number: int) -> None:
                await asyncio.sleep(number * 0.003)
                reply = await engine.infer(request(number % 250, depth=number % 3))
                np.testing.assert_array_equal(logits(reply), [expected(number % 250, number % 3)])
                answers[number] = answers.get(number, 0) + 1

            asked = [asyncio.ensure_future(ask(number)) for number in range(500)]
            for _ in range(3):
                await asyncio.sleep(0.4)
                await until(lambda: pids(engine))
                os.kill(pids(engine)[0], signal.SIGKILL)
            found = await asyncio.gather(*asked, return_exceptions=True)
            # a row whose second try was killed too is answered with an error, and nothing else is
            assert all(one is None or isinstance(one, WorkerError) for one in found)
            assert sum(one is None for one in found) >= 490
            assert set(answers.values()) == {1}
            await until(lambda: told.restarts == 3 and len(pids(engine)) == 2)
            assert engine.is_ready

    run(work())


def test_a_batch_whose_worker_is_killed_is_answered_within_a_second(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, instances=2) as engine:
            inputs = {"pixels": np.concatenate([pixels(number, wish=SLEEPS) for number in range(2)])}
            first = asyncio.ensure_future(engine.infer(Request(id="1", model="fake", inputs=inputs)))
            await asyncio.sleep(0.1)
            started = time.monotonic()
            for pid in pids(engine)[:1]:
                os.kill(pid, signal.SIGKILL)
            reply = await first
            # one half runs again, 0.3 s for a row
            assert time.monotonic() - started < 1
            np.testing.assert_array_equal(logits(reply), [expected(0), expected(1)])

    run(work())


def test_one_row_that_fails_does_not_fail_those_beside_it(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        async with engine_of(tmp_path, told=told, instances=2, batching={"max_batch": 32}) as engine:
            for wish, error in (
                (OTHER_ERROR, WorkerError),
                (INPUT_ERROR, InputError),
                (KILLS, WorkerError),
                (KILLS_LATER, WorkerError),
            ):
                await until(lambda: len(pids(engine)) == 2)
                # workers are kept busy until all rows are there
                busy = [asyncio.ensure_future(engine.infer(request(200, wish=SLEEPS))) for _ in range(2)]
                await asyncio.sleep(0.05)
                asked = [
                    asyncio.ensure_future(engine.infer(request(number, depth=1, wish=wish if number == 13 else 0)))
                    for number in range(32)
                ]
                found = await asyncio.gather(*asked, return_exceptions=True)
                await asyncio.gather(*busy)
                assert isinstance(found[13], error)
                assert "secret" not in str(found[13])
                for number, one in enumerate(found):
                    if number != 13:
                        assert isinstance(one, Reply)
                        np.testing.assert_array_equal(logits(one), [expected(number, 1)])
            await until(lambda: len(pids(engine)) == 2)
            assert told.restarts == 4

    run(work())


def test_a_worker_that_hangs_costs_its_rows_one_try(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, instances=2, pool={"liveness_timeout_s": 0.4}) as engine:
            pid = pids(engine)[0]
            os.kill(pid, signal.SIGSTOP)
            found = await asyncio.gather(*(engine.infer(request(number)) for number in range(20)))
            for number, reply in enumerate(found):
                np.testing.assert_array_equal(logits(reply), [expected(number)])
            with pytest.raises(WorkerError, match="no sign of life"):
                await engine.infer(request(1, wish=STOPS))
            await until(lambda: len(pids(engine)) == 2)

    run(work())


def test_all_workers_gone_is_not_ready_and_then_ready_again(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, instances=2) as engine:
            for pid in pids(engine):
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not engine.is_ready, 1.0)
            assert engine.model("fake").state == "LOADING"
            # it waits for them
            reply = await engine.infer(request(3))
            np.testing.assert_array_equal(logits(reply), [expected(3)])
            assert engine.is_ready

    run(work())


def test_a_model_whose_workers_are_given_up_says_so(tmp_path: Path) -> None:
    async def work() -> None:
        flag = tmp_path / "flag"
        limits = {"max_failures": 2, "backoff_s": 0.2}
        async with engine_of(tmp_path, pool=limits, dies_if=str(flag)) as engine:
            flag.touch()
            os.kill(pids(engine)[0], signal.SIGKILL)
            await until(lambda: not engine.is_ready)
            with pytest.raises(UnavailableError, match="ended 2 times"):
                await engine.infer(request(3))
            info = engine.model("fake")
            assert info.state == "UNAVAILABLE"
            assert "ended 2 times" in info.reason
            with pytest.raises(UnavailableError, match="has no worker"):
                await engine.infer(request(3))
            # a new try is the way out
            flag.unlink()
            await engine.load("fake")
            np.testing.assert_array_equal(logits(await engine.infer(request(3))), [expected(3)])

    run(work())


# loading


def test_a_new_version_under_load_loses_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, instances=2, row_s=0.001) as engine:
            versions: dict[str, float] = {engine.model("fake").version: 0.0}
            is_over = False
            num_answered = 0

            async def ask(client: int) -> None:
                nonlocal num_answered
                while not is_over:
                    depths = [client % 3, (client + 1) % 3]
                    inputs = {"pixels": np.concatenate([pixels(client, depth=depth) for depth in depths])}
                    reply = await engine.infer(Request(id="1", model="fake", inputs=inputs))
                    # all rows of a request are of one version
                    right = [expected(client, depth, offset=versions[reply.version]) for depth in depths]
                    np.testing.assert_array_equal(logits(reply), right)
                    num_answered += 1

            clients = [asyncio.ensure_future(ask(client)) for client in range(12)]
            for number in range(1, 4):
                artifact = write_fake(tmp_path / "fake", offset=1000.0 * number, row_s=0.001)
                versions[version_of(artifact)] = 1000.0 * number
                # the old version goes on, workers that it restarts too
                os.kill(pids(engine)[0], signal.SIGKILL)
                await engine.load("fake")
                assert engine.model("fake").version == version_of(artifact)
            await asyncio.sleep(0.1)
            is_over = True
            await asyncio.gather(*clients)
            assert num_answered > 100
            assert len(versions) == 4
            await until(lambda: not engine._retiring)

    run(work())


@pytest.mark.parametrize(("behaviour", "words"), [({"is_wrong": True}, "other answers"), ({"dies": True}, "ended")])
def test_a_bad_new_version_leaves_the_old_one(tmp_path: Path, behaviour: dict[str, Any], words: str) -> None:
    async def work() -> None:
        async with engine_of(tmp_path) as engine:
            version = engine.model("fake").version
            write_fake(tmp_path / "fake", offset=1000.0, **behaviour)
            with pytest.raises(ArtifactError, match=words):
                await engine.load("fake")
            (tmp_path / "fake" / "router.json").write_text("{}")
            with pytest.raises(ArtifactError):
                await engine.load("fake")
            reply = await engine.infer(request(3, version=version))
            np.testing.assert_array_equal(logits(reply), [expected(3)])
            assert engine.is_ready

    run(work())


def test_unload_answers_what_waits_and_load_brings_it_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path) as engine:
            asked = [asyncio.ensure_future(engine.infer(request(number, wish=SLEEPS))) for number in range(2)]
            await asyncio.sleep(0.05)
            unloading = asyncio.ensure_future(engine.unload("fake"))
            await asyncio.sleep(0.05)
            with pytest.raises(UnavailableError, match="it was unloaded"):
                await engine.infer(request(3))
            await unloading
            assert [logits(one.result())[0, 0] for one in asked] == [0.0, 10.0]
            assert engine.model("fake").state == "UNAVAILABLE"
            assert engine.is_ready
            await engine.load("fake")
            assert engine.model("fake").state == "READY"
            await engine.infer(request(3))

    run(work())


def test_names_and_versions_that_are_not_served(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path) as engine:
            with pytest.raises(UnknownModelError, match="no model 'other'; served are fake"):
                await engine.infer(request(3, model="other"))
            with pytest.raises(UnknownModelError, match="no version 'old'"):
                await engine.infer(request(3, version="old"))
            with pytest.raises(UnknownModelError):
                engine.model("fake", "old")
            for work_on in (engine.load, engine.unload):
                with pytest.raises(UnknownModelError):
                    await work_on("other")

    run(work())


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(ArtifactError, match="other answers"):
            async with engine_of(tmp_path, is_wrong=True):
                pass

    run(work())


def test_a_drain_answers_everything_that_was_accepted(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, instances=2, row_s=0.005) as engine:
            asked = [asyncio.ensure_future(engine.infer(request(number, depth=number % 3))) for number in range(60)]
            await asyncio.sleep(0)
            stopping = asyncio.ensure_future(engine.stop(20.0))
            await asyncio.sleep(0)
            assert not engine.is_ready
            with pytest.raises(UnavailableError, match="the server ends"):
                await engine.infer(request(3))
            assert await stopping
            for number, one in enumerate(await asyncio.gather(*asked)):
                np.testing.assert_array_equal(logits(one), [expected(number, number % 3)])

    run(work())


def test_a_drain_ends_in_its_time(tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_of(tmp_path, batch_s=5.0) as engine:
            asked = asyncio.ensure_future(engine.infer(request(3)))
            await asyncio.sleep(0.05)
            started = time.monotonic()
            assert not await engine.stop(0.2)
            assert time.monotonic() - started < 8
            with pytest.raises(UnavailableError, match="was stopped"):
                await asked

    run(work())


# the audit


def test_an_audit_that_finds_nothing_goes_on(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        options = {"shadow_share": 1.0, "audit_folder": tmp_path / "audits"}
        async with engine_of(tmp_path, told=told, options=options) as engine:
            for number in range(30):
                await engine.infer(request(number, depth=number % 3))
            served = engine._models["fake"].current
            assert served is not None
            assert served._shadow is not None
            audit = served._shadow.audit
            await until(lambda: audit.samples == 30)
            assert audit.mean == 0
            await until(lambda: (30, False) in told.audits)
            await until(lambda: list((tmp_path / "audits").glob("fake-*.json")))

    run(work())


def test_an_alarm_sends_everything_through_the_full_path_now_and_after_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        options = {"shadow_share": 1.0, "audit_folder": tmp_path / "audits"}
        async with engine_of(tmp_path, options=options) as engine:
            paths = set()
            for number in range(40):
                reply = await engine.infer(request(number, lies=True))
                paths.add(reply.paths[0])
                await asyncio.sleep(0.005)
            assert paths == {"int8/1", "float32/1"}
            assert engine.model("fake").paths == ("float32/1",)
            assert "the audit found 100.0%" in engine.model("fake").reason
        async with engine_of(tmp_path, options=options) as engine:
            reply = await engine.infer(request(3, is_explained=True))
            assert reply.paths == ("float32/1",)
            assert "the audit found" in reply.explanations[0]["said"][0]

    run(work())


def test_what_an_observer_is_told(tmp_path: Path) -> None:
    async def work() -> None:
        told = Told()
        async with engine_of(tmp_path, told=told) as engine:
            first, *others = (engine.infer(request(number, wish=SLEEPS)) for number in range(3))
            slow = [asyncio.ensure_future(first)]
            # what comes at once runs together
            await asyncio.sleep(0.02)
            await asyncio.gather(*slow, *others)
            await until(lambda: told.queues and told.queues[-1] == ("int8/1", 0))
            assert ("int8/1", 2) in told.queues
            assert set(told.live) == {1}

    run(work())
