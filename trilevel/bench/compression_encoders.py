"""Encoders of MiniLM's size in 8 bits, ours and others', each as a call from token ids (1, tokens) to a vector."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import trilevel
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.manifest import (
    MODEL_FILE,
    NATIVE,
    PROBE_FILE,
    Artifact,
    Manifest,
    is_artifact,
    read_artifact,
    write_artifact,
)
from trilevel.artifact.probe import Probe, write_probes
from trilevel.artifact.runtime.openvino import openvino_core
from trilevel.artifact.runtime.predictor import Runtime, load_predictor
from trilevel.attention.near import has_fast_products
from trilevel.bench.compression_memory import (
    ARTIFACT,
    ARTIFACT_NATIVE,
    DENSE_OPENVINO,
    DENSE_OURS,
    DENSE_TORCH,
    NNCF_FILE,
    OURS_NATIVE,
    OURS_ONNXRUNTIME,
    OURS_OPENVINO,
)
from trilevel.bench.encoders import document_ids
from trilevel.bench.encoders_contenders import Models
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.errors import ImplementationError, require
from trilevel.model.encoder import Encoder

Vector = npt.NDArray[np.float32]
Call = Callable[[npt.NDArray[np.int64]], Vector]
CALIBRATION_TOKENS = (64, 128, 256, 512, 2_048)


class MeanVector(nn.Module):
    """The mean of an encoder's token vectors, as MiniLM makes a vector of a text."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, tokens) to (batch, dim)."""
        vector: Tensor = self.encoder(input_ids).mean(1)
        return vector


@dataclass(frozen=True)
class Encoders:
    """What the contenders are made of; graphs are written below `folder` once, minutes each.

    Args:
        folder: for graphs.
        models: MiniLM, dense and converted.
        tell: told what is being made.
        num_layers: the first ones alone; None for all.
    """

    folder: Path
    models: Models
    tell: Callable[[str], None] = lambda _what: None
    num_layers: int | None = None

    @cached_property
    def dense(self) -> MeanVector:
        """MiniLM in float32, attention by SDPA."""
        return self._vector(self.models.dense.encoder)

    @cached_property
    def converted(self) -> MeanVector:
        """MiniLM with local, regional and global heads, in float32."""
        return self._vector(self.models.converted())

    def _vector(self, encoder: Encoder) -> MeanVector:
        if self.num_layers is not None:
            encoder = copy.deepcopy(encoder)
            encoder.stack.blocks = encoder.stack.blocks[: self.num_layers]
        return MeanVector(encoder).eval()

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Ids of several lengths, two of each."""
        longest = max(CALIBRATION_TOKENS)
        ids = document_ids(self.models, 4 * longest)
        return [ids[:, start : start + tokens] for tokens in CALIBRATION_TOKENS for start in (0, 2 * longest)]

    def artifact(self, kind: Literal["dense", "converted"], *, is_native: bool = False) -> Artifact:
        """INT8 by post-training quantization with our own defaults."""
        folder = self.folder / ("dense-int8" if kind == "dense" else ARTIFACT_NATIVE if is_native else ARTIFACT)
        if is_artifact(folder):
            return read_artifact(folder)
        self.tell(f"quantizing and exporting the {kind} encoder")
        with torch.inference_mode():
            module = freeze(quantize(getattr(self, kind), QuantizeConfig(), self.calibration))
            examples = [self.calibration[2], self.calibration[5].repeat(2, 1)]
            probes = [Probe(inputs={"input_ids": x.numpy()}, outputs={"vector": module(x).numpy()}) for x in examples]
        graph = folder.with_suffix(".onnx")
        axes: Mapping[str, tuple[int | str, ...]] = {"input_ids": ("batch", "tokens"), "vector": ("batch", 384)}
        inputs, outputs = export_onnx(
            module, {"input_ids": examples[1]}, axes, graph, output="vector", is_native=is_native
        )
        manifest = Manifest(
            task="embedding", name=f"{kind} MiniLM", trilevel=trilevel.__version__, precision="int8",
            target=NATIVE if is_native else "portable", inputs=inputs, outputs=outputs,
        )  # fmt: skip
        files = {MODEL_FILE: partial(_move, graph), PROBE_FILE: partial(write_probes, probes)}
        return write_artifact(folder, manifest, files)

    def float_graph(self) -> Path:
        """The dense encoder as ONNX in float32."""
        path = self.folder / "dense.onnx"
        if not path.exists():
            self.tell("exporting the dense encoder")
            partial_path = path.with_suffix(".tmp")
            axes: Mapping[str, tuple[int | str, ...]] = {"input_ids": ("batch", "tokens"), "vector": ("batch", 384)}
            export_onnx(
                self.dense, {"input_ids": self.calibration[2].repeat(2, 1)}, axes, partial_path, output="vector"
            )
            partial_path.replace(path)
        return path


def _move(source: Path, path: Path) -> None:
    path.write_bytes(source.read_bytes())
    source.unlink()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One encoder.

    Args:
        name: as the table shows it.
        build: makes the call.
        exact: what its vectors are compared with, `dense` or `converted`.
        cosine: to that, below which it is broken: what 8 bits may cost is not an error.
        longest: tokens beyond which it is not tried.
    """

    name: str
    build: Callable[[Encoders, int], Call]
    exact: Literal["dense", "converted"] = "dense"
    cosine: float = 0.98
    longest: int = 65_536

    @property
    def is_ours(self) -> bool:
        """Whether a failed check is ours to answer for."""
        return self.name.startswith("trilevel")


def contenders() -> list[Contender]:
    """All of them; the first is what the others are compared with."""
    return [
        Contender(name=DENSE_TORCH, build=_torch, cosine=0.99999),
        Contender(name="dense, torch compiled, bfloat16", build=_compiled, cosine=0.99),
        Contender(name="dense, torch PT2E INT8, compiled", build=_pt2e, longest=2_048),
        Contender(name="dense, ONNX Runtime dynamic INT8", build=_dynamic, cosine=0.9),
        # its weights overflow 16 bits on processors without VNNI (decision 0014); what that costs is shown, not hidden
        Contender(name=DENSE_OPENVINO, build=_nncf, cosine=0.9),
        Contender(name=DENSE_OURS, build=partial(_artifact, kind="dense", runtime="openvino")),
        Contender(
            name=OURS_OPENVINO, build=partial(_artifact, kind="converted", runtime="openvino"), exact="converted",
        ),
        Contender(
            name=OURS_ONNXRUNTIME,
            build=partial(_artifact, kind="converted", runtime="onnxruntime"),
            exact="converted",
        ),
        Contender(
            name=OURS_NATIVE,
            build=partial(_artifact, kind="converted", runtime="onnxruntime", is_native=True),
            exact="converted",
        ),
    ]  # fmt: skip


def _torch(encoders: Encoders, _tokens: int) -> Call:
    return _call(encoders.dense)


def _call(module: Callable[[Tensor], Tensor]) -> Call:
    def run(ids: npt.NDArray[np.int64]) -> Vector:
        with torch.inference_mode():
            return module(torch.from_numpy(ids)).float().numpy()

    return run


def _compiled(encoders: Encoders, _tokens: int) -> Call:
    if not has_fast_products(torch.bfloat16):
        raise ImplementationError("this processor has no bfloat16")
    return _call(torch.compile(copy.deepcopy(encoders.dense).to(torch.bfloat16), dynamic=False))


def _pt2e(encoders: Encoders, tokens: int) -> Call:
    pt2e = require("torchao.quantization.pt2e.quantize_pt2e", extra="bench")
    x86 = require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", extra="bench")
    ids = encoders.calibration[0].repeat(1, 1 + tokens // CALIBRATION_TOKENS[0])[:, :tokens]
    with torch.no_grad():
        export: Any = torch.export.export
        graph = export(encoders.dense, (ids,)).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(graph, quantizer)
        # the graph is of one length, so its calibration is too
        document = document_ids(encoders.models, 4 * tokens)
        for part in document.split(tokens, 1):
            prepared(part)
        converted = pt2e.convert_pt2e(prepared)
        with torch._inductor.config.patch(freezing=True):
            # compiled by the first call, within these options
            call = _call(torch.compile(converted, dynamic=False))
            call(ids.numpy())
    return call


def _dynamic(encoders: Encoders, _tokens: int) -> Call:
    ort = require("onnxruntime", extra="onnxruntime")
    quantization = require("onnxruntime.quantization", extra="onnxruntime")
    path = encoders.folder / "dense-dynamic.onnx"
    if not path.exists():
        encoders.tell("quantizing the dense encoder by ONNX Runtime")
        given = str(encoders.float_graph())
        quantization.quantize_dynamic(given, str(path), weight_type=quantization.QuantType.QInt8, per_channel=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(["vector"], {"input_ids": ids})[0]


def _nncf(encoders: Encoders, _tokens: int) -> Call:
    nncf = require("nncf", extra="bench")
    path = encoders.folder / NNCF_FILE
    core = openvino_core()
    if not path.exists():
        openvino = require("openvino", extra="openvino")
        encoders.tell("quantizing the dense encoder by NNCF")
        data = nncf.Dataset(encoders.calibration, lambda ids: [ids.numpy()])
        model = nncf.quantize(core.read_model(str(encoders.float_graph())), data, model_type=nncf.ModelType.TRANSFORMER)
        openvino.save_model(model, str(path), compress_to_fp16=False)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if has_fast_products(torch.bfloat16) else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
    request = compiled.create_infer_request()
    return lambda ids: next(iter(request.infer([ids]).values())).copy()


def _artifact(
    encoders: Encoders,
    _tokens: int,
    *,
    kind: Literal["dense", "converted"],
    runtime: Runtime,
    is_native: bool = False,
) -> Call:
    precision: Any = "bfloat16" if runtime == "openvino" and has_fast_products(torch.bfloat16) else "float32"
    artifact = encoders.artifact(kind, is_native=is_native)
    predictor = load_predictor(artifact, runtime, threads=torch.get_num_threads(), precision=precision)
    return lambda ids: predictor.run({"input_ids": ids})["vector"]


@contextmanager
def quiet() -> Iterator[None]:
    """The peers warn of their own parts, and print to the root logger."""
    levels = {name: logging.getLogger(name).level for name in ("nncf", "root", "torch.export", "torchao")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
