"""Time and peak memory of the model on one document under one kind of attention, in a process of its own.

The process loads everything, runs a short input once, resets its high-water mark and only then meets the document. It
answers with one JSON object a line: the event `ready`, `pass` after every pass, `done`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trilevel.applications.documents.memory import peak_bytes, reset_peak, return_freed
from trilevel.errors import ImplementationError

Attention = Literal["empty", "trilevel", "focus", "bfloat16", "int8", "sdpa", "materialised"]
MIN_RUNS = 3
MAX_RUNS = 9
LIMIT_S = 60.0
"""A pass is stopped after this long."""
BUDGET_S = 90.0
"""No pass is begun that would make all passes of one process, the warm-up included, take longer together."""
ENOUGH_S = 4.0
"""After `MIN_RUNS`, further passes are made until they took this long together."""
LOAD_LIMIT_S = 180.0
SHORT_TOKENS = 1_500
"""Long enough for every kind of attention to run the code it runs on the document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to measure.

    `document` is an `.npz` that `save_encoded` wrote, cut to `max_tokens`; `model` a folder, None for the shipped one;
    `threads` are torch's. `empty` loads everything and runs no document; `int8` is the shipped artifact, without torch.
    """

    attention: Attention
    document: str
    model: str | None
    max_tokens: int
    threads: int
    limit_s: float = LIMIT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the process reported.

    `seconds` are the passes after the warm-up (the warm-up alone when there was no time for another);
    `peak_memory_bytes` is that of the whole process in its first pass over the document, with freed memory returned to
    the system at once, and `loaded_bytes` what it held before; `scores` (units,); `stopped` says why there is no time,
    if so.
    """

    attention: Attention
    tokens: int
    seconds: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    loaded_bytes: int | None = None
    scores: np.ndarray | None = None
    stopped: str = ""

    @property
    def median_s(self) -> float | None:
        """Median of the passes, None without one."""
        return statistics.median(self.seconds) if self.seconds else None


def measure(job: Job, *, on_pass: Callable[[], None] = lambda: None) -> Measured:
    """Run one job in a process of its own, which never outlives the call; `on_pass` is called after every pass.

    Raises:
        ImplementationError: the process failed, and not for want of time or memory.
    """
    command = [sys.executable, "-m", "trilevel.applications.documents.measure", json.dumps(dataclasses.asdict(job))]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # the pipe to its standard input is never written: it closes when this process is gone, however it went
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        try:
            found = _follow(process, job, on_pass)
        finally:
            # on Ctrl-C as well: a process left behind would disturb whatever is measured next
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if found is None:
            errors.seek(0)
            found = _failed(job, process.returncode, errors.read())
    return found


def _follow(process: subprocess.Popen[str], job: Job, on_pass: Callable[[], None]) -> Measured | None:
    """Read events until the last one or a time limit; None when the process ended before."""
    lines = _lines(process)
    limit_s, tokens, loaded = LOAD_LIMIT_S, 0, None
    while True:
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            stopped = f"stopped after {limit_s:.0f} s"
            return Measured(
                attention=job.attention, tokens=tokens, peak_memory_bytes=peak_bytes(process.pid), stopped=stopped
            )
        if line is None:
            # let the exit code come in before the caller kills
            process.wait()
            return None
        event = json.loads(line)
        if event["event"] == "ready":
            limit_s, tokens, loaded = job.limit_s, event["tokens"], event["memory_bytes"]
        elif event["event"] == "pass":
            on_pass()
        else:
            scores = None if event["scores"] is None else np.array(event["scores"], np.float32)
            return Measured(
                attention=job.attention,
                tokens=tokens,
                seconds=tuple(event["seconds"]),
                peak_memory_bytes=event["peak_memory_bytes"],
                loaded_bytes=loaded,
                scores=scores,
            )


def _lines(process: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """The process's output by line, None at its end; a thread of its own so that waiting can have a limit."""
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def _failed(job: Job, code: int, errors: str) -> Measured:
    if code == -signal.SIGKILL or "can't allocate memory" in errors or "MemoryError" in errors:
        return Measured(attention=job.attention, tokens=job.max_tokens, stopped="out of memory")
    last = " ".join(errors.strip().splitlines()[-1:]) or "no message"
    raise ImplementationError(f"the process that measures {job.attention!r} ended with code {code}: {last}")


def save_encoded(path: Path, encoded: Any) -> None:
    """Write an `Encoded` document as `.npz` of plain arrays."""
    arrays = {field.name: getattr(encoded, field.name) for field in dataclasses.fields(encoded)}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def load_encoded(path: str | Path) -> Any:
    """What `save_encoded` wrote."""
    from trilevel.applications.documents.encoded import Encoded

    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return Encoded(**{**arrays, "units_left_out": int(arrays["units_left_out"])})


_Prepare = Callable[[Any], Callable[[], np.ndarray]]
"""What makes a pass over an `Encoded` document, which gives scores (units,)."""


def _in_torch(job: Job) -> _Prepare:
    import torch

    from trilevel.applications.documents.passes import load_variant, prepare

    torch.set_num_threads(job.threads)
    return partial(prepare, load_variant(job.model, job.attention), attention=job.attention)


def _in_runtime(job: Job) -> _Prepare:
    from trilevel.applications.documents.artifact import INT8, DocumentPredictor
    from trilevel.artifact.check import default_runtime
    from trilevel.artifact.manifest import read_artifact
    from trilevel.artifact.runtime.predictor import load_predictor

    artifact = read_artifact(INT8)
    predictor = DocumentPredictor(artifact, load_predictor(artifact, default_runtime(), threads=job.threads))
    return lambda encoded: partial(predictor.score, encoded)


def _run(job: Job) -> Iterator[dict[str, Any]]:
    encoded = load_encoded(job.document).cut(job.max_tokens)
    prepare = (_in_runtime if job.attention == "int8" else _in_torch)(job)
    # the warm-up pass is the one whose memory counts: what it frees leaves the process at once, so that the peak is
    # what the pass holds and not what the allocator kept; the timed passes run with an allocator that keeps
    return_freed(True)
    prepare(encoded.cut(SHORT_TOKENS))()
    run = prepare(encoded)
    reset_peak()
    yield {"event": "ready", "tokens": encoded.num_tokens, "memory_bytes": peak_bytes()}
    seconds: list[float] = []
    scores = None
    peak = peak_bytes()
    while job.attention != "empty" and _wants_more(seconds):
        start = time.perf_counter()
        scores = run()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            peak = peak_bytes()
            return_freed(False)
        yield {"event": "pass", "seconds": seconds[-1]}
    yield {
        "event": "done",
        "seconds": seconds[1:] or seconds,
        "peak_memory_bytes": peak,
        "scores": None if scores is None else scores.tolist(),
    }


def _wants_more(seconds: list[float]) -> bool:
    """Whether another pass is due; the first is the warm-up."""
    if not seconds:
        return True
    if sum(seconds) + seconds[-1] > BUDGET_S:
        return False
    timed = seconds[1:]
    return len(timed) < MIN_RUNS or (len(timed) < MAX_RUNS and sum(timed) < ENOUGH_S)


def _end_with_parent() -> None:
    """End this process as soon as its standard input closes."""

    def wait() -> None:
        # not through sys.stdin, whose lock must be free when the interpreter ends
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; this one has nothing to say about it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _end_with_parent()
    for _event in _run(Job(**json.loads(sys.argv[1]))):
        sys.stdout.write(json.dumps(_event) + "\n")
        sys.stdout.flush()
