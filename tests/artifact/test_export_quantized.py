"""Quantized models in ONNX: the answers of torch, and kernels that really compute in integers."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trilevel.artifact.export.onnx import optimize, shorten
from trilevel.artifact.export.quantized import store_transposed, translation_table
from trilevel.artifact.runtime.onnxruntime import SESSION_ENTRIES
from trilevel.artifact.runtime.openvino import openvino_core, read_graph
from trilevel.compression.layers import Reads
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize, quantized_bytes
from trilevel.model.ffn import FeedForward

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
ov = pytest.importorskip("openvino")

CONFIGS: dict[str, QuantizeConfig] = {
    "int8": QuantizeConfig(),
    "uint8": QuantizeConfig(activations="uint8"),
    "int8_plain": QuantizeConfig(smooth=None),
    "table_4bit": QuantizeConfig(embedding_bits=4),
    "stored_4bit": QuantizeConfig(weight_bits=4),
    "weights": QuantizeConfig(activations=None),
    "weights_4bit": QuantizeConfig(activations=None, weight_bits=4),
}
MODELS = ["mlp", "block"]
# an export takes seconds: the two grids on the block, and what only one model has, by default
SLOW = [
    ("block", "int8_plain"),
    ("block", "table_4bit"),
    ("mlp", "stored_4bit"),
    ("block", "weights"),
    ("mlp", "weights_4bit"),
    ("mlp", "uint8"),
    ("mlp", "int8_plain"),
]
CASES = [
    pytest.param(model, config, marks=[pytest.mark.slow] if (model, config) in SLOW else [], id=f"{model}-{config}")
    for model in MODELS
    for config in CONFIGS
]
SIZES = [(1, 17), (3, 29)]
VOCABULARY = 1_009


class Mlp(nn.Module):
    """Two linear maps of tokens that are embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 64, padding_idx=0)
        self.up, self.down = nn.Linear(64, 192), nn.Linear(192, 48)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(self.table(ids))))
        return out


class Block(nn.Module):
    """Attention and feed-forward part with residuals, in plain operators."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 64, padding_idx=0)
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)
        self.in_proj, self.out_proj = nn.Linear(64, 192), nn.Linear(64, 64)
        self.ffn = FeedForward(64, 160)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        heads = self.in_proj(self.first(x)).view(*ids.shape, 12, 16).transpose(1, 2)
        q, k, v = heads.split(4, 1)
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        x = x + self.out_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.ffn(self.second(x))
        return out


def drawn(batch: int, tokens: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens))


def made(model: str, config: str) -> nn.Module:
    torch.manual_seed(7)
    return freeze(quantize({"mlp": Mlp, "block": Block}[model]().eval(), CONFIGS[config], [drawn(2, 13), drawn(3, 41)]))


def export(module: nn.Module, example: Tensor | None = None) -> Any:
    """Dynamic batch and tokens, or the shape of the example."""
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) if example is None else None
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # the exporter's own use of what Python and torch deprecate
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            program = torch.onnx.export(
                module,
                (drawn(2, 13) if example is None else example,),
                dynamo=True,
                opset_version=20,
                dynamic_shapes=dims,
                custom_translation_table=translation_table(),
                verbose=False,
                optimize=False,
            )
            assert program is not None
            optimize(program.model)
            return program
    finally:
        log.setLevel(level)


class Exported:
    """A frozen model, its file, and both runtimes on it."""

    def __init__(self, model: str, config: str, folder: Path) -> None:
        self.module, self.config = made(model, config), CONFIGS[config]
        self.path, optimized = folder / "model.onnx", folder / "optimized.onnx"
        program = export(self.module)
        self.num_transposed = store_transposed(program.model)
        shorten(program.model)
        program.save(str(self.path), external_data=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.optimized_model_filepath = str(optimized)
        for entry, value in SESSION_ENTRIES.items():
            options.add_session_config_entry(entry, value)
        self.session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        self.optimized = [node.op_type for node in onnx.load(str(optimized)).graph.node]
        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self.compiled = openvino_core().compile_model(read_graph(self.path), "CPU", hints)

    def run(self, ids: Tensor) -> dict[str, Tensor]:
        fed = {self.session.get_inputs()[0].name: ids.numpy()}
        return {
            "onnxruntime": torch.from_numpy(self.session.run(None, fed)[0]),
            "openvino": torch.from_numpy(np.array(self.compiled([ids.numpy()])[0])),
        }

    def kernels(self) -> list[tuple[str, str]]:
        """Layer and primitive of what OpenVINO runs."""
        found = []
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            found.append((str(info["layerType"].value), str(info["primitiveType"].value)))
        return found


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, config = request.param
    return Exported(model, config, tmp_path_factory.mktemp("export"))


def step(output: Tensor) -> float:
    """One step of 255 over the range of the output."""
    return float(output.max() - output.min()) / 255


@pytest.mark.parametrize(
    "exported",
    [pytest.param(case.values, marks=case.marks, id=case.id) for case in CASES],
    indirect=True,
)
class TestExported:
    def test_both_runtimes_answer_as_torch_does(self, exported: Exported) -> None:
        for size in SIZES:
            ids = drawn(*size)
            with torch.no_grad():
                wanted = exported.module(ids)
            for name, found in exported.run(ids).items():
                difference = (found - wanted).abs()
                assert float(difference.max()) <= step(wanted), name
                # an activation on the edge between two integers may fall to either, and attention carries that to every
                # token of the sequence: at most 0.03 of a step over 300 draws, and 0.18 or more if inputs stay float
                assert float(difference.mean()) <= 0.05 * step(wanted), name

    def test_kernels_compute_in_integers(self, exported: Exported) -> None:
        linears = [part for part in exported.module.modules() if isinstance(part, Reads)]
        rounded = sum(part.input_scale is not None for part in linears)
        fused = exported.optimized.count("MatMulIntegerToFloat")
        connected = [kernel for layer, kernel in exported.kernels() if layer == "FullyConnected"]
        assert fused == rounded
        assert len(connected) == len(linears)
        assert sum(kernel.lower().endswith("_i8") for kernel in connected) == rounded
        if not rounded:
            assert exported.optimized.count("MatMulNBits") == len(linears)

    def test_weights_and_table_are_stored_once_as_integers(self, exported: Exported) -> None:
        graph = onnx.load(str(exported.path)).graph
        floats = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
        # scales, one for each row of the table or two for its groups
        assert all(int(np.prod(tensor.dims)) <= 2 * VOCABULARY for tensor in floats)
        table = next(node for node in graph.node if node.op_type == "Gather")
        stored = {tensor.name: tensor for tensor in graph.initializer}
        is_packed = exported.config.embedding_bits == 4
        kind = onnx.TensorProto.UINT8 if is_packed else onnx.TensorProto.INT8
        assert stored[table.input[0]].data_type == kind
        assert list(stored[table.input[0]].dims) == [VOCABULARY, 32 if is_packed else 64]
        reader = next(node for node in graph.node if table.output[0] in node.input)
        assert reader.op_type == ("Cast" if is_packed else "DequantizeLinear")
        stored_bytes = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
        assert stored_bytes <= quantized_bytes(exported.module) + 1_000
        # nodes and names
        assert exported.path.stat().st_size <= stored_bytes + 25_000
        # OpenVINO keeps the table in integers too
        assert ("Gather", "ref_any_I8" if is_packed else "ref_any_i8") in exported.kernels()


@pytest.mark.slow
def test_the_error_is_that_of_nncf(tmp_path: Path) -> None:
    nncf = pytest.importorskip("nncf")
    torch.manual_seed(7)
    model = Block().eval()
    with torch.no_grad():
        # some features far larger than the others, as in trained models
        model.second.weight[3], model.first.weight[5] = 17.0, 11.0
    batches, ids = [drawn(2, 13), drawn(3, 41)], drawn(3, 29)
    wanted = model(ids).detach()

    def error(found: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    path = tmp_path / "float.onnx"
    export(model).save(str(path), external_data=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nncf.quantize(
            openvino_core().read_model(str(path)),
            nncf.Dataset(batches, lambda batch: [batch.numpy()]),
            model_type=nncf.ModelType.TRANSFORMER,
        )
    compiled = openvino_core().compile_model(theirs, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    reference = error(torch.from_numpy(np.array(compiled([ids.numpy()])[0])))
    for activations in ("int8", "uint8"):
        config = QuantizeConfig(activations=activations, quantize_embeddings=False)
        ours = error(quantize(model, config, batches)(ids).detach())
        assert ours <= 1.3 * reference, (activations, ours, reference)


def test_float_masters_are_refused() -> None:
    model = quantize(nn.Sequential(nn.Linear(8, 16)).eval(), QuantizeConfig(), [torch.randn(3, 8)])
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"call freeze\(model\) first"):
        export(model, torch.randn(3, 8))


def test_the_transpose_of_a_weight_that_others_read_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = freeze(quantize(nn.Linear(16, 16), QuantizeConfig(), [torch.randn(3, 16)]))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) + self.inner.weight
            return out

    program = export(Twice().eval(), torch.randn(16, 16))
    before = [node.op_type for node in program.model.graph]
    store_transposed(program.model)
    assert [node.op_type for node in program.model.graph].count("MatMul") == before.count("MatMul")
