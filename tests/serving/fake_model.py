"""An artifact with paths whose workers run no graph: what a row asks for in its pixels happens."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import Artifact, Manifest, Segment, Tensors, read_artifact, write_artifact
from trilevel.artifact.routed import model_hash
from trilevel.errors import ArtifactError, InputError
from trilevel.routing.certificate import Certificate, Platform
from trilevel.routing.certify import Proof
from trilevel.routing.harm import FeatureHarm, MarginHarm
from trilevel.routing.router import FamilyRule, Router
from trilevel.serving.requests import Arrays, Request

OPENER = f"{__name__}:open_fake"
PIXELS = Tensors(dtype="uint8", axes=("batch", 1, 2, 3))
HIDDEN = Tensors(dtype="float32", axes=("batch", 5))
LOGITS = Tensors(dtype="float32", axes=("batch", 3))
PATHS = ("int8/1", "int8/2", "float32/1")
BOUND = 0.01
# what a row asks for
KILLS, INPUT_ERROR, OTHER_ERROR, STOPS, KILLS_LATER, SLEEPS = 1, 2, 3, 4, 5, 6


def pixels(number: int, *, depth: int = 0, wish: int = 0, lies: bool = False) -> npt.NDArray[np.uint8]:
    """A row (1, 1, 2, 3) that leaves behind segment `depth`, 2 for the full path."""
    return np.array([[[[number, depth, lies], [wish, 0, 0]]]], np.uint8)


def request(number: int, **options: Any) -> Request:
    """Of one row; options of `Request` and of `pixels`."""
    own = {name: options.pop(name) for name in ("depth", "wish", "lies") if name in options}
    inputs = {"pixels": pixels(number, **own)}
    return Request(**{"id": f"r{number}", "model": "fake", "inputs": inputs, **options})


def expected(number: int, depth: int = 0, *, offset: float = 0.0) -> npt.NDArray[np.float32]:
    """The logits (3,) of the answer."""
    stage = 7 if depth == 2 else depth
    best = 10.0 * number + stage + offset
    return np.array([best, best - 9, best - 10], np.float32)


class FakeRunner:
    def __init__(self, behaviour: Mapping[str, Any]) -> None:
        self._behaviour = behaviour
        self.facts: Mapping[str, Any] = {
            "platform": {},
            "is_routed": behaviour.get("is_routed", True),
            "reason": "" if behaviour.get("is_routed", True) else "nothing is certified",
        }

    def run(self, family: str, segment: int, arrays: Arrays) -> tuple[Arrays, Arrays]:
        if segment == 0:
            x = arrays["pixels"].reshape(-1, 6).astype(np.float32)
            hidden = np.pad(x[:, :4], ((0, 0), (0, 1)))
        else:
            hidden = arrays["hidden"]
        number, depth, lies, wish = hidden[:, :4].T
        for one in wish.astype(int).tolist():
            _grant(one, segment)
        time.sleep(self._behaviour.get("batch_s", 0.0) + len(hidden) * self._behaviour.get("row_s", 0.0))
        is_full = family == "float32"
        best = 10 * number + (7 if is_full else segment) + self._behaviour.get("offset", 0.0)
        margin = np.where((depth <= segment) | is_full, 9.0, 0.5)
        logits = np.stack([best, best - margin, best - margin - 1], 1).astype(np.float32)
        if not is_full:
            swapped = logits[:, [1, 0, 2]]
            logits = np.where(lies[:, None] > 0, swapped, logits)
        return {"hidden": hidden}, {"logits": logits}


def _grant(wish: int, segment: int) -> None:
    if wish == KILLS or (wish == KILLS_LATER and segment == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    elif wish == STOPS:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif wish == INPUT_ERROR:
        raise InputError("the pixels are wrong.")
    elif wish == OTHER_ERROR:
        raise RuntimeError("secret contents")
    elif wish == SLEEPS:
        time.sleep(0.3)


def open_fake(options: Mapping[str, Any]) -> FakeRunner:
    artifact = read_artifact(options["folder"])
    behaviour = artifact.manifest.settings["behaviour"]
    time.sleep(behaviour.get("start_s", 0.0))
    flag = behaviour.get("dies_if", "")
    if behaviour.get("dies") or (flag and Path(flag).exists()):
        os._exit(3)
    if behaviour.get("is_wrong"):
        raise ArtifactError("the fake gives other answers than it was made to give.")
    return FakeRunner(behaviour)


def router() -> Router:
    never = FeatureHarm(mean=(0.0,) * 4, deviation=(1.0,) * 4, weights=(0.0,) * 4, intercept=-5.0)
    exits = (MarginHarm(intercept=0.0, slope=1.0), MarginHarm(intercept=-1.0, slope=1.0))
    rule = FamilyRule(name="int8", paths=("int8/1", "int8/2"), start=never, exits=exits)
    return Router(full="float32/1", families=(rule,), features=("brightness", "contrast", "edges", "pixel_entropy"))


def write_fake(folder: Path, **behaviour: Any) -> Artifact:
    """An artifact with a certificate; `behaviour` is what its workers do, see above."""
    segments = (
        Segment(inputs={"pixels": PIXELS}, outputs={"next_hidden": HIDDEN, "logits": LOGITS}),
        Segment(inputs={"hidden": HIDDEN}, outputs={"logits": LOGITS}),
    )
    manifest = Manifest(
        task="images",
        name="fake",
        trilevel="0",
        precision="float32",
        target=None,
        inputs={"pixels": PIXELS},
        outputs={"logits": LOGITS},
        settings={"behaviour": behaviour, "labels": ["a", "b", "c"]},
        families={"int8": segments},
    )
    times = {"int8": [[[1.0], [8.0]], [[2.0], [16.0]]], "float32": [[[4.0], [32.0]]]}
    latency = {"form": 1, "machine": {}, "batches": [1, 8], "lengths": [1], "router_ms": [[0.1], [0.1]]}
    files: dict[str, Any] = {
        "model.onnx": b"whole",
        "probe.npz": b"none",
        "int8-1.onnx": b"first",
        "int8-2.onnx": b"second",
        "router.json": json.dumps(router().to_dict()).encode(),
        "latency.json": json.dumps(latency | {"through_ms": times}).encode(),
    }
    draft = write_artifact(folder, manifest, {name: _writes(data) for name, data in files.items()})
    certificate = Certificate(
        proofs=(Proof(target=f"agreement:{BOUND}", units=1000, mean=0.001, errors=1, p_value=1e-3),),
        delta=0.05,
        setting={"int8/start": 0.5, "int8/1": 2.0, "int8/2": 2.0},
        hashes={"model": model_hash(draft), "router": router().sha256},
        platform=Platform(runtime="onnxruntime", version="1", isa="avx2", precision="float32"),
        seed=0,
        tries=1,
        created="2026-11-28",
        measured={},
    )
    files["certificate.json"] = json.dumps(certificate.to_dict()).encode()
    return write_artifact(folder, manifest, {name: _writes(data) for name, data in files.items()})


def _writes(data: bytes) -> Callable[[Path], None]:
    return partial(_write, data=data)


def _write(path: Path, *, data: bytes) -> None:
    path.write_bytes(data)
