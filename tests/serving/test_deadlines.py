"""Time limits: they end what takes too long, by itself and in time, and cost one timer together."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.serving.fake_engine import looped, until
from trilevel.serving.deadlines import Deadlines


@looped
async def test_each_ends_at_its_own_time() -> None:
    deadlines, ended = Deadlines(), []

    async def wait(seconds: float) -> None:
        started = time.monotonic()
        with pytest.raises(TimeoutError), deadlines.within(seconds) as limit:
            await asyncio.sleep(5)
        assert limit.is_over
        assert seconds - 0.01 < time.monotonic() - started < seconds + 0.15
        ended.append(seconds)

    await asyncio.gather(*[wait(seconds) for seconds in (0.3, 0.1, 0.2)])
    assert ended == [0.1, 0.2, 0.3]
    assert len(deadlines) == 0


@looped
async def test_what_is_in_time_goes_on() -> None:
    deadlines = Deadlines()
    with deadlines.within(0.05) as limit:
        await asyncio.sleep(0.001)
    with deadlines.within(None):
        await asyncio.sleep(0.1)
    assert not limit.is_over
    # an error of what is within is no matter of time
    with pytest.raises(KeyError), deadlines.within(5):
        raise KeyError


@looped
async def test_who_cancels_from_outside_is_heard() -> None:
    deadlines = Deadlines()

    async def wait() -> None:
        with deadlines.within(5):
            await asyncio.sleep(5)

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    async def both() -> None:
        with deadlines.within(0.01):
            await asyncio.sleep(5)

    task = asyncio.ensure_future(both())
    await asyncio.sleep(0)
    # the time is over, and someone else cancels in the same turn of the loop
    time.sleep(0.02)
    asyncio.get_running_loop().call_later(0, task.cancel)
    await asyncio.wait([task])
    assert task.cancelled() or isinstance(task.exception(), TimeoutError)


@looped
async def test_limits_within_limits() -> None:
    deadlines = Deadlines()
    with pytest.raises(TimeoutError), deadlines.within(0.05) as outer, deadlines.within(5) as inner:
        await asyncio.sleep(5)
    assert (outer.is_over, inner.is_over) == (True, False)
    current = asyncio.current_task()
    assert current is not None
    assert not current.cancelling()


@looped
async def test_those_that_were_kept_do_not_pile_up() -> None:
    deadlines = Deadlines()
    with deadlines.within(50):
        for _ in range(20_000):
            with deadlines.within(60):
                pass
        assert len(deadlines) < 3000
        with pytest.raises(TimeoutError), deadlines.within(0.02):
            await asyncio.sleep(5)
    await until(lambda: len(deadlines) < 3000)
