"""Requests of a real artifact with the answers that each gets alone: what goodput is measured on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from trilevel.applications.documents.artifact import graph_inputs
from trilevel.applications.documents.builtin import builtin_document
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.applications.route import load_samples
from trilevel.artifact.manifest import Artifact, read_artifact
from trilevel.artifact.routed import RoutedPredictor, has_paths, read_certificate, read_router
from trilevel.artifact.runtime.predictor import Runtime, load_predictor
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.artifact.verify import tolerance
from trilevel.data.documents import Document
from trilevel.errors import InputError
from trilevel.serving.engine import runtime_of
from trilevel.serving.protocol.json_infer import LENGTH_HEADER
from trilevel.serving.protocol.tensors import datatype_of, to_bytes

Arrays = Mapping[str, npt.NDArray[Any]]
_HEAD_BYTES = 1024
EASY_SHARE = 0.7
DOCUMENT_TOKENS = 8192
"""Of each document of the summariser."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What is sent and what should come back.

    Attributes:
        name: of the artifact.
        runtime: that it runs in.
        inputs: of each request, one row.
        answers: to each, computed alone; the graph's first output.
        paths: that each took; empty names without paths.
        full_ms: median of the full path, one at a time, in this process with one thread.
        easy_share: of the requests, by their paths; None without paths.
        limit: what an answer in a batch may differ by, over the largest value; 0 where nothing may.
        documents: of a summariser, as a dense model takes them; empty otherwise.
    """

    name: str
    folder: Path
    runtime: Runtime
    inputs: Sequence[Arrays]
    answers: Sequence[npt.NDArray[Any]]
    paths: Sequence[str]
    full_ms: float
    easy_share: float | None
    limit: float
    documents: Sequence[Encoded] = ()

    @property
    def is_routed(self) -> bool:
        """Whether rows take different paths."""
        return self.easy_share is not None

    @property
    def headers(self) -> dict[str, str]:
        """Of HTTP, for all bodies alike."""
        return {LENGTH_HEADER: str(_HEAD_BYTES), "content-type": "application/octet-stream"}

    @property
    def bodies(self) -> list[bytes]:
        """Requests of the protocol, tensors as bytes and the answer as JSON."""
        return [_body(one) for one in self.inputs]

    def wrong(self, sent: Sequence[int], replies: Sequence[bytes], *, with_paths: bool) -> int:
        """How many replies are not the answers that the requests get alone."""
        return sum(not self._is_right(body, reply, with_paths) for body, reply in zip(sent, replies, strict=True))

    def _is_right(self, body: int, reply: bytes, with_paths: bool) -> bool:
        try:
            said = orjson.loads(reply)
            found = np.array(said["outputs"][0]["data"], np.float32).reshape(self.answers[body].shape)
        except (ValueError, KeyError, IndexError):
            return False
        exact = self.answers[body].astype(np.float32)
        is_near = float(np.abs(found - exact).max()) <= self.limit * float(np.abs(exact).max())
        return is_near and (not with_paths or said["parameters"]["paths"] == self.paths[body])


def _body(inputs: Arrays) -> bytes:
    tensors = [
        {
            "name": name,
            "datatype": datatype_of(array.dtype),
            "shape": array.shape,
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in inputs.items()
    ]
    head = orjson.dumps({"inputs": tensors})
    # one length for all, so that one header fits all
    assert len(head) <= _HEAD_BYTES
    return b"".join([head.ljust(_HEAD_BYTES), *map(to_bytes, inputs.values())])


def open_workload(folder: Path, data: Path | None, count: int) -> Workload:
    """Of an artifact and its data: where it has paths, so many requests, `EASY_SHARE` of them of the cheapest path.

    Args:
        folder: of the artifact.
        data: see `load_samples`; None for the documents that ship, for the summariser alone.
        count: requests at most; they are sent again and again.

    Raises:
        InputError: the data cannot be used, or has too few samples of one kind.
        ArtifactError: the artifact is damaged.
    """
    artifact = read_artifact(folder)
    runtime = runtime_of(artifact, None)
    if has_paths(artifact) and read_certificate(artifact, read_router(artifact)) is not None and data is not None:
        return _routed(artifact, runtime, data, count)
    if artifact.manifest.task != "documents":
        raise InputError(f"{folder} has no certified paths and is no summariser; give an artifact of trilevel route.")
    return _documents(artifact, runtime, count)


def _routed(artifact: Artifact, runtime: Runtime, data: Path, count: int) -> Workload:
    predictor = RoutedPredictor(artifact, runtime, threads=1)
    if predictor.rule is None:
        raise InputError(f"{artifact.path}: {predictor.reason}.")
    samples = load_samples(artifact, data, split="test", limit=6 * count)
    wanted = {True: round(EASY_SHARE * count), False: count - round(EASY_SHARE * count)}
    chosen: list[tuple[Arrays, Any, str]] = []
    for row in samples.rows:
        inputs = samples.collate([row], samples.length_of(row))
        (routed,) = predictor.route(inputs)
        is_easy = routed.segments_run == 1
        if (is_easy or routed.path == predictor.router.full) and wanted[is_easy]:
            wanted[is_easy] -= 1
            chosen.append((inputs, routed.output[None], routed.path))
    if any(wanted.values()):
        raise InputError(f"{data} lacks {wanted[True]} easy and {wanted[False]} hard samples; ask for fewer requests.")
    whole = predictor.whole
    return Workload(
        name=artifact.manifest.name,
        folder=artifact.path,
        runtime=runtime,
        inputs=[inputs for inputs, _, _ in chosen],
        answers=[answer for _, answer, _ in chosen],
        paths=[path for _, _, path in chosen],
        full_ms=median(_ms(whole, inputs) for inputs, _, _ in chosen[:9]),
        easy_share=EASY_SHARE,
        limit=tolerance(artifact.manifest.precision, "float32"),
    )


def _documents(artifact: Artifact, runtime: Runtime, count: int) -> Workload:
    tokenizer = DocumentTokenizer(read_tokenizer(artifact))
    most = int(artifact.manifest.settings["max_tokens"])
    documents = [one.cut(min(DOCUMENT_TOKENS, most)) for one in _long_documents(tokenizer, count)]
    predictor = load_predictor(artifact, runtime, threads=1)
    inputs = [graph_inputs([one]) for one in documents]
    return Workload(
        name=artifact.manifest.name,
        folder=artifact.path,
        runtime=runtime,
        inputs=inputs,
        answers=[next(iter(predictor.run(one).values())) for one in inputs],
        paths=[""] * len(inputs),
        full_ms=median(_ms(predictor, one) for one in inputs[:9]),
        easy_share=None,
        limit=tolerance(artifact.manifest.precision, "float32"),
        documents=documents,
    )


def _long_documents(tokenizer: DocumentTokenizer, count: int) -> list[Encoded]:
    """The text that ships, each time begun at another place."""
    lines = builtin_document().text.split("\n")
    starts = [len(lines) * number // count for number in range(count)]
    texts = ["\n".join(lines[start:] + lines[:start]) for start in starts]
    return [encode(split_units(Document(id="", title="", text=text)), tokenizer) for text in texts]


def _ms(predictor: Any, inputs: Arrays) -> float:
    start = time.perf_counter()
    predictor.run(inputs)
    return 1e3 * (time.perf_counter() - start)
