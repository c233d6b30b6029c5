"""Measuring in a process of its own: what comes back, what is stopped, and that no process is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.applications.documents.demo_model import document, save_small_model
from trilevel.applications.documents import measure as module
from trilevel.applications.documents.checkpoint import load_run
from trilevel.applications.documents.encoded import encode
from trilevel.applications.documents.measure import Attention, Job, measure, save_encoded
from trilevel.applications.documents.passes import load_variant, prepare
from trilevel.applications.documents.units import split_units
from trilevel.errors import ImplementationError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_small_model(tmp_path_factory.mktemp("model"))
    tokenizer = load_run(path)[1]
    save_encoded(path / "document.npz", encode(split_units(document()), tokenizer))
    return path


def job(folder: Path, attention: Attention = "trilevel", **changes: Any) -> Job:
    values = {"document": str(folder / "document.npz"), "model": str(folder), "max_tokens": 10_000, "threads": 1}
    return Job(**{"attention": attention, **values, **changes})


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Every process that is started."""
    found: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*args: Any, **arguments: Any) -> Any:
        found.append(popen(*args, **arguments))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def test_a_process_answers_with_times_memory_and_the_same_scores(
    folder: Path, started: list[subprocess.Popen[str]]
) -> None:
    passes: list[int] = []
    found = measure(job(folder, "materialised"), on_pass=lambda: passes.append(1))
    assert len(passes) == 1 + len(found.seconds)
    assert len(found.seconds) >= module.MIN_RUNS
    assert found.median_s == sorted(found.seconds)[len(found.seconds) // 2]
    assert found.peak_memory_bytes is not None
    assert found.peak_memory_bytes > 50 * 2**20
    assert found.scores is not None
    encoded = module.load_encoded(str(folder / "document.npz"))
    own = prepare(load_variant(str(folder), "sdpa"), encoded, "sdpa")()
    np.testing.assert_allclose(found.scores, own, atol=1e-4)
    assert found.tokens == encoded.num_tokens
    assert started[0].returncode is not None


def test_a_pass_over_the_limit_is_stopped(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    found = measure(job(folder, limit_s=0.0))
    assert found.stopped == "stopped after 0 s"
    assert found.median_s is None
    assert found.peak_memory_bytes
    assert started[0].returncode == -signal.SIGKILL


def test_an_interrupt_leaves_no_process(folder: Path, started: list[subprocess.Popen[str]]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(job(folder), on_pass=interrupt)
    assert started[0].returncode is not None


def test_a_process_ends_when_nobody_listens(folder: Path) -> None:
    command = [sys.executable, "-m", module.__name__, json.dumps(asdict(job(folder)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 1


def test_a_failure_is_told_with_its_last_line(folder: Path) -> None:
    with pytest.raises(ImplementationError, match=r"measures 'trilevel' ended with code 1: .*CheckpointError.*nowhere"):
        measure(job(folder, model=str(folder / "nowhere")))


@pytest.mark.parametrize(
    ("code", "errors"),
    [
        (-9, ""),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        (1, "MemoryError"),
    ],
)
def test_want_of_memory_is_no_failure(folder: Path, code: int, errors: str) -> None:
    found = module._failed(job(folder, "materialised"), code, errors)
    assert found.stopped == "out of memory"
    assert found.median_s is None


def in_process(folder: Path, attention: Attention, **changes: Any) -> list[dict[str, Any]]:
    return list(module._run(job(folder, attention, **changes)))


def test_the_empty_process_runs_nothing(folder: Path) -> None:
    events = in_process(folder, "empty")
    assert [event["event"] for event in events] == ["ready", "done"]
    assert events[-1]["seconds"] == []
    assert events[-1]["scores"] is None


def test_focus_and_dense_differ_from_trilevel(folder: Path) -> None:
    kinds: tuple[Attention, ...] = ("trilevel", "focus", "sdpa", "materialised")
    scores = {kind: np.array(in_process(folder, kind)[-1]["scores"]) for kind in kinds}
    np.testing.assert_allclose(scores["sdpa"], scores["materialised"], atol=1e-4)
    for kind in ("focus", "sdpa"):
        assert np.abs(scores["trilevel"] - scores[kind]).max() > 1e-4


def test_a_shorter_length_keeps_whole_units(folder: Path) -> None:
    ready = in_process(folder, "trilevel", max_tokens=200)[0]
    assert 150 < ready["tokens"] <= 200


def test_the_warm_up_counts_when_there_is_no_time_for_more() -> None:
    assert module._wants_more([])
    assert module._wants_more([20.0])
    assert not module._wants_more([50.0])
    assert module._wants_more([0.1, 0.1, 0.1])
    assert module._wants_more([0.1] * 5)
    assert not module._wants_more([0.1] * 10)
    assert not module._wants_more([2.0] * 4)
