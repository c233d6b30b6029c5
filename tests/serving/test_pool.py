"""Workers that answer, end, hang and do not start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.fake_model import (
    INPUT_ERROR,
    KILLS,
    OPENER,
    OTHER_ERROR,
    SLEEPS,
    STOPS,
    expected,
    pixels,
    write_fake,
)
from trilevel.errors import ArtifactError, ConfigError
from trilevel.serving.pool import Pool, PoolConfig
from trilevel.serving.process import Done, Gone, Job


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


@asynccontextmanager
async def pool_of(folder: Path, *, behaviour: dict[str, Any] | None = None, **options: Any) -> AsyncIterator[Pool]:
    write_fake(folder / "fake", **(behaviour or {}))
    config = PoolConfig(**{"backoff_s": 0.05, **options})
    pool = Pool(OPENER, {"folder": str(folder / "fake")}, config)
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


def job(*rows: Any) -> Job:
    arrays = {"pixels": np.concatenate(rows)}
    return Job(family="int8", segment=0, rows=len(rows), arrays=arrays, leave=(2.0, 2.0))


async def answer(pool: Pool, own: Job) -> Done | Gone:
    future: asyncio.Future[Done | Gone] = asyncio.get_running_loop().create_future()
    pool.submit(own, future.set_result)
    return await future


async def until(is_so: Any, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.01)


def test_a_job_and_its_state(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path) as pool:
            assert pool.live == pool.idle == 1
            assert pool.facts["is_routed"] is True
            found = await answer(pool, job(pixels(3), pixels(5, depth=1)))
            assert isinstance(found, Done)
            np.testing.assert_array_equal(found.outputs[0]["logits"][0], expected(3))
            assert found.state["hidden"].shape == (2, 5)
            last = Job(family="int8", segment=1, rows=2, arrays=found.state)
            found = await answer(pool, last)
            assert isinstance(found, Done)
            np.testing.assert_array_equal(found.outputs[0]["logits"][1], expected(5, 1))
            assert not found.state

    run(work())


@pytest.mark.parametrize(
    ("depths", "leave", "num_run"),
    [((0, 1), (2.0, 2.0), 1), ((1, 1), (2.0, 2.0), 2), ((0, 0), (None, 2.0), 2), ((2, 2), (2.0, None), 2)],
)
def test_segments_follow_each_other_until_a_row_leaves(
    tmp_path: Path, depths: tuple[int, ...], leave: tuple[float | None, ...], num_run: int
) -> None:
    async def work() -> None:
        async with pool_of(tmp_path) as pool:
            arrays = {"pixels": np.concatenate([pixels(number, depth=depth) for number, depth in enumerate(depths)])}
            found = await answer(pool, Job(family="int8", segment=0, rows=2, arrays=arrays, leave=leave))
            assert isinstance(found, Done)
            assert len(found.outputs) == len(found.seconds) == num_run
            assert bool(found.state) == (num_run < 2)

    run(work())


def test_the_supervisor_loads_no_runtime() -> None:
    code = (
        "import sys, trilevel.serving.engine\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'openvino', 'onnx', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_in_a_job_do_not_end_the_worker(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path) as pool:
            found = await answer(pool, job(pixels(3, wish=INPUT_ERROR)))
            assert isinstance(found, Done)
            assert (found.error, found.is_input) == ("the pixels are wrong.", True)
            found = await answer(pool, job(pixels(3, wish=OTHER_ERROR)))
            assert isinstance(found, Done)
            # what it said may quote what was sent
            assert (found.error, found.is_input) == ("RuntimeError in the worker", False)
            wrong = Job(family="int8", segment=0, rows=3, arrays={"pixels": pixels(1)})
            found = await answer(pool, wrong)
            assert isinstance(found, Done)
            assert "arrays of [1] rows for 3" in found.error
            assert pool.restarts == 0

    run(work())


def test_a_worker_that_is_killed_fails_its_job_at_once_and_comes_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path) as pool:
            (pid,) = pool.pids
            waiting = asyncio.ensure_future(answer(pool, job(pixels(3, wish=SLEEPS))))
            await asyncio.sleep(0.05)
            started = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            assert isinstance(await waiting, Gone)
            assert time.monotonic() - started < 0.2
            assert pool.live == 0
            await until(lambda: pool.idle == 1)
            assert pool.pids != (pid,)
            assert isinstance(await answer(pool, job(pixels(3))), Done)
            assert pool.restarts == 1

    run(work())


def test_a_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path, liveness_timeout_s=0.4) as pool:
            started = time.monotonic()
            found = await answer(pool, job(pixels(3, wish=STOPS)))
            assert isinstance(found, Gone)
            assert "no sign of life for 0.4 s" in found.reason
            assert 0.3 < time.monotonic() - started < 2
            await until(lambda: pool.idle == 1)

    run(work())


def test_a_long_job_is_no_hang_until_its_own_time_is_over(tmp_path: Path) -> None:
    async def work() -> None:
        long = {"batch_s": 0.7}
        async with pool_of(tmp_path, behaviour=long, liveness_timeout_s=0.4) as pool:
            assert isinstance(await answer(pool, job(pixels(3))), Done)
        async with pool_of(tmp_path, behaviour=long, job_timeout_s=0.2) as pool:
            found = await answer(pool, job(pixels(3)))
            assert isinstance(found, Gone)
            assert "more than 0.2 s" in found.reason

    run(work())


def test_a_supervisor_that_stood_still_kills_nobody(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path, liveness_timeout_s=0.4) as pool:
            pids = pool.pids
            await asyncio.sleep(0.15)
            # all of a container is frozen for a while, and the worker is the last to go on
            os.kill(pids[0], signal.SIGSTOP)
            time.sleep(0.9)
            await asyncio.sleep(0.15)
            os.kill(pids[0], signal.SIGCONT)
            await asyncio.sleep(0.3)
            assert pool.pids == pids

    run(work())


def test_a_slow_start_is_no_hang(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path, behaviour={"start_s": 0.8}, liveness_timeout_s=0.2) as pool:
            assert pool.live == 1

    run(work())


@pytest.mark.parametrize(
    ("behaviour", "options", "words"),
    [
        ({"dies": True}, {}, "ended before it was ready"),
        ({"is_wrong": True}, {}, "other answers than it was made to give"),
        ({"start_s": 20}, {"start_timeout_s": 0.5}, "not ready within 0.5 s"),
    ],
)
def test_a_first_start_that_fails(
    tmp_path: Path, behaviour: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    async def work() -> None:
        with pytest.raises(ArtifactError, match=words):
            async with pool_of(tmp_path, behaviour=behaviour, instances=2, **options):
                pass

    run(work())


def test_a_worker_that_no_longer_starts_is_given_up(tmp_path: Path) -> None:
    async def work() -> None:
        flag = tmp_path / "flag"
        behaviour = {"dies_if": str(flag)}
        async with pool_of(tmp_path, behaviour=behaviour, max_failures=3, backoff_s=0.01) as pool:
            flag.touch()
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda: bool(pool.given_up))
            assert "ended 3 times before it was ready" in pool.given_up
            assert pool.restarts == 3

    run(work())


def test_rows_that_end_workers_do_not_end_the_server(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path, max_failures=2, backoff_s=0.01) as pool:
            for _ in range(3):
                await until(lambda: pool.idle == 1)
                assert isinstance(await answer(pool, job(pixels(3, wish=KILLS))), Gone)
            await until(lambda: pool.idle == 1)
            assert not pool.given_up

    run(work())


def test_a_system_that_starts_no_process_now_may_do_so_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with pool_of(tmp_path, backoff_s=0.01) as pool:
            real = subprocess.Popen

            def refuse(*_arguments: Any, **_options: Any) -> None:
                monkeypatch.setattr(subprocess, "Popen", real)
                raise OSError("no more processes")

            monkeypatch.setattr(subprocess, "Popen", refuse)
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda: pool.restarts == 2 and pool.idle == 1)

    run(work())


def test_no_process_is_left(tmp_path: Path) -> None:
    async def work() -> None:
        async with pool_of(tmp_path, instances=2) as pool:
            pids = pool.pids
            assert len(pids) == 2
        for pid in pids:
            assert not Path(f"/proc/{pid}").exists()

    run(work())


def test_a_supervisor_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    write_fake(tmp_path / "fake", batch_s=30.0)
    code = (
        "import asyncio, sys\n"
        "from trilevel.serving.pool import Pool, PoolConfig\n"
        "from tests.serving.test_pool import OPENER, job, pixels\n"
        "async def work():\n"
        "    config = PoolConfig(instances=2, liveness_timeout_s=1.0)\n"
        "    pool = Pool(OPENER, {'folder': sys.argv[1]}, config)\n"
        "    await pool.start()\n"
        "    pool.submit(job(pixels(1)), print)\n"
        "    print(*pool.pids, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(work())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(tmp_path / "fake")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as supervisor:
        assert supervisor.stdout is not None
        pids = supervisor.stdout.readline().split()
        supervisor.kill()
    assert len(pids) == 2
    # one has nothing to do, the other computes
    end = time.monotonic() + 5
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "words"),
    [({"instances": 0}, "instances=0"), ({"liveness_timeout_s": 0.0}, "above 0 seconds")],
)
def test_settings_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PoolConfig(**options)
