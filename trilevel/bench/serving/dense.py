"""The dense model that a peer serves: documents by full attention in torch, else an artifact's own full path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import read_artifact
from trilevel.artifact.runtime.predictor import load_predictor


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSpec:
    """What is served.

    Attributes:
        samples: folder of the samples, a file `NUMBER.npz` each: documents as `save_encoded` writes them, else inputs
            of the graph.
        artifact: whose full path runs; None for the documents model with dense attention.
        max_batch: samples that run together.
        workers: processes.
        threads: of each.
    """

    samples: str
    artifact: str | None
    max_batch: int
    workers: int = 1
    threads: int = 1

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> DenseSpec:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


def open_dense(spec: DenseSpec) -> Callable[[Sequence[int]], list[list[float]]]:
    """Answers to samples by their numbers, run in one batch."""
    files = sorted(Path(spec.samples).glob("*.npz"), key=lambda path: int(path.stem))
    return _documents(spec, files) if spec.artifact is None else _graph(spec, files)


def _documents(spec: DenseSpec, files: Sequence[Path]) -> Callable[[Sequence[int]], list[list[float]]]:
    import torch

    from trilevel.applications.documents.data import collate
    from trilevel.applications.documents.measure import load_encoded
    from trilevel.applications.documents.passes import load_variant, without_padding

    torch.set_num_threads(spec.threads)
    model, documents = load_variant(None, "sdpa"), [load_encoded(file) for file in files]

    @torch.inference_mode()
    def run(samples: Sequence[int]) -> list[list[float]]:
        chosen = [documents[sample] for sample in samples]
        batch = collate(chosen)
        found = model(without_padding(batch) if len(chosen) == 1 else batch)
        return [row.tolist() for row in found.float()]

    return run


def _graph(spec: DenseSpec, files: Sequence[Path]) -> Callable[[Sequence[int]], list[list[float]]]:
    predictor = load_predictor(read_artifact(str(spec.artifact)), "onnxruntime", threads=spec.threads)
    inputs = list(map(_arrays, files))

    def run(samples: Sequence[int]) -> list[list[float]]:
        together = {name: np.concatenate([inputs[sample][name] for sample in samples]) for name in inputs[0]}
        (found,) = predictor.run(together).values()
        return [row.tolist() for row in found]

    return run


def _arrays(file: Path) -> dict[str, npt.NDArray[Any]]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
