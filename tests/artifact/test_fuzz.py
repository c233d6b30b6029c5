"""Manifests that were changed at random, sealed again or not: read, or refused with an error of ours.

TRILEVEL_FUZZ_SECONDS=600 pytest -m slow tests/artifact/test_fuzz.py
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.applications.classification.tiny import make_tokenizer
from trilevel.applications.artifacts import open_task
from trilevel.artifact.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PROBE_FILE,
    TOKENIZER_FILE,
    Manifest,
    Tensors,
    read_artifact,
    write_artifact,
)
from trilevel.artifact.probe import Probe, read_probes, write_probes
from trilevel.errors import TrilevelError
from trilevel.model import folder as folders

SECONDS = float(os.environ.get("TRILEVEL_FUZZ_SECONDS", "20"))
EXAMPLES = 300
TASKS = ("classification", "embedding", "images")
IDS = Tensors(dtype="int64", axes=("batch", "tokens"))
MANIFEST = Manifest(
    task="classification",
    name="fuzzed",
    trilevel="0.4.0",
    precision="int8",
    target="portable",
    inputs={"pixels": Tensors(dtype="uint8", axes=("batch", 3, 8, 8)), "input_ids": IDS, "attention_mask": IDS},
    outputs={
        "logits": Tensors(dtype="float32", axes=("batch", 2)),
        "vector": Tensors(dtype="float32", axes=("batch", 7)),
    },
    settings={"labels": ["bad", "good"], "max_tokens": 64, "padding_id": 0, "text_column": "text"},
    levels={"ratio": [6, 3, 1], "window": 128},
)
SHORT = st.text(max_size=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | SHORT | st.sampled_from(TASKS),
    lambda own: st.lists(own, max_size=3) | st.dictionaries(SHORT, own, max_size=3),
    max_leaves=6,
)
PATHS = st.lists(st.integers(0, 40), min_size=1, max_size=4)


def write(folder: Path) -> str:
    """A whole artifact; returns its manifest's text."""
    probe = Probe(
        inputs={name: np.zeros((1, 1), np.int64) for name in MANIFEST.inputs},
        outputs={name: np.zeros((1, 1), np.float32) for name in MANIFEST.outputs},
    )
    files: dict[str, Callable[[Path], object]] = {
        MODEL_FILE: lambda path: path.write_bytes(b"no graph"),
        PROBE_FILE: lambda path: write_probes([probe], path),
        TOKENIZER_FILE: lambda path: path.write_text(make_tokenizer().to_str()),
    }
    write_artifact(folder, MANIFEST, files)  # type: ignore[arg-type]  # what writing returns is not used
    return (folder / MANIFEST_FILE).read_text()


def sealed(text: str) -> str:
    return text.replace(folders._UNSEALED, folders._seal(text))


def changed(value: Any, path: list[int], new: Any, *, is_removed: bool) -> None:
    """Replace, or take away, what lies at a place that numbers lead to."""
    for turn, number in enumerate(path):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = keys[number % len(keys)]
        is_last = turn == len(path) - 1 or not isinstance(value[key], (dict, list))
        if is_last and is_removed:
            del value[key]
        elif is_last:
            value[key] = new
        if is_last:
            return
        value = value[key]


def read(folder: Path) -> None:
    """All of a load that happens before a runtime sees the graph."""
    try:
        artifact = read_artifact(folder)
        read_probes(artifact)
        open_task(artifact, predictor=None)  # type: ignore[arg-type]  # nothing is predicted
    except TrilevelError:
        return
    json.dumps(artifact.manifest.to_dict())


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 170)
def test_no_manifest_does_worse_than_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    text = write(folder)
    whole = json.loads(text)
    where = folder / MANIFEST_FILE
    count = [0]
    quick = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @quick
    @given(
        places=st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(0, 255)), max_size=6), end=st.integers()
    )
    def bytes_are_changed(places: list[tuple[int, int]], end: int) -> None:
        data = bytearray(text.encode())
        for place, byte in places:
            data[place] = byte
        where.write_bytes(data[: abs(end)] if end % 2 else data)
        count[0] += 1
        read(folder)

    @quick
    @given(changes=st.lists(st.tuples(PATHS, JSON, st.booleans()), min_size=1, max_size=4), task=st.sampled_from(TASKS))
    def values_are_changed(changes: list[tuple[list[int], Any, bool]], task: str) -> None:
        values = copy.deepcopy(whole)
        values["config"]["task"] = task
        for path, new, is_removed in changes:
            changed(values, path, new, is_removed=is_removed)
        values["sha256"] = folders._UNSEALED
        where.write_text(sealed(json.dumps(values, indent=2) + "\n"))
        count[0] += 1
        read(folder)

    @quick
    @given(data=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
    def anything(data: bytes) -> None:
        where.write_bytes(data)
        count[0] += 1
        read(folder)

    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        bytes_are_changed()
        values_are_changed()
        anything()
    # with -s it says how far it came
    sys.stdout.write(f"{count[0]:,} manifests in {SECONDS:.0f} s\n")
    where.write_text(text)
    read_artifact(folder)
    shutil.rmtree(folder)
