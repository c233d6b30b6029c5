"""Segments one after another give what the model gives, in every runtime, from files that store no weight twice."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch

from trilevel.applications.classification.model import Classifier, ClassifierConfig, Masked
from trilevel.applications.images.model import ImageClassifier, ImageClassifierConfig
from trilevel.artifact.export.branches import export_branches
from trilevel.artifact.export.onnx import export_onnx
from trilevel.artifact.export.segments import classifier_segments, export_segments, segment_probes
from trilevel.artifact.manifest import (
    MANIFEST_FILE,
    MODEL_FILE,
    PROBE_FILE,
    Artifact,
    Manifest,
    read_artifact,
    segment_file,
    write_artifact,
)
from trilevel.artifact.probe import write_probes
from trilevel.artifact.runtime.openvino import openvino_core
from trilevel.artifact.runtime.predictor import Runtime
from trilevel.artifact.runtime.steps import SegmentSteps
from trilevel.attention.levels import LevelRatio, Levels
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.errors import ArtifactError, ConfigError
from trilevel.model.config import EncoderConfig
from trilevel.model.patches import Patches

LEVELS = Levels(ratio=LevelRatio(1, 1, 1), window=17, region_size=8, num_global_tokens=5)
TEXT_AXES = {
    "input_ids": ("batch", "tokens"),
    "attention_mask": ("batch", "tokens"),
    "hidden": ("batch", "tokens", 24),
    "logits": ("batch", 5),
}
IMAGE_AXES = {"pixels": ("batch", 3, 12, 20), "hidden": ("batch", 60, 24), "logits": ("batch", 5)}


def text_model() -> Any:
    torch.manual_seed(7)
    encoder = EncoderConfig(vocab_size=53, dim=24, num_heads=3, num_layers=2, levels=LEVELS, max_tokens=256)
    labels = ("a", "b", "c", "d", "e")
    model = Classifier(ClassifierConfig(encoder=encoder, labels=labels, max_tokens=256, exits=(1,))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def image_model() -> Any:
    torch.manual_seed(11)
    patches = Patches(image_size=(12, 20), patch_size=(2, 2), num_channels=3, num_extra_tokens=0)
    encoder = EncoderConfig(
        vocab_size=None, dim=24, num_heads=3, num_layers=3, levels=LEVELS, rope_theta=None, patches=patches
    )
    labels, mean, deviation = ("a", "b", "c", "d", "e"), (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    config = ImageClassifierConfig(encoder=encoder, labels=labels, mean=mean, deviation=deviation, exits=(1, 2))
    return ImageClassifier(config).eval()


def texts(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, max(1, tokens * 3 // 4) :] = 0
    return {"input_ids": torch.randint(1, 53, (batch, tokens)), "attention_mask": mask}


def images(batch: int) -> dict[str, torch.Tensor]:
    return {"pixels": torch.randint(0, 256, (batch, 3, 12, 20), dtype=torch.uint8)}


def write(folder: Path, model: Any, calls: list[dict[str, torch.Tensor]], axes: Any, family: str) -> Artifact:
    """An artifact whose one family is the model's segments, beside the whole graph."""
    where = folder.with_name(f"{folder.name}-files")
    where.mkdir(parents=True)
    whole = Masked(model).eval() if "attention_mask" in axes else model
    inputs, outputs = export_onnx(whole, calls[0], axes, where / MODEL_FILE, output="logits")
    segments = export_segments(classifier_segments(model, list(calls[0])), family, calls[0], axes, where)
    manifest = Manifest(
        task="classification",
        name="exits",
        trilevel="0",
        precision="float32",
        target=None,
        inputs=inputs,
        outputs=outputs,
        families={family: segments},
    )
    files: dict[str, Any] = {MODEL_FILE: partial(copy, where / MODEL_FILE)}
    files |= {name: partial(copy, where / name) for name in manifest.segment_files}
    probes = [dataclasses.replace(one, outputs={"logits": one.outputs["logits"][:, -1]})
              for one in segment_probes(model, calls)]  # fmt: skip
    files[PROBE_FILE] = lambda path: write_probes(probes, path)
    return write_artifact(folder, manifest, files)


def copy(source: Path, path: Path) -> None:
    path.write_bytes(source.read_bytes())


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write(tmp_path_factory.mktemp("segments") / "images", image_model(), [images(2)], IMAGE_AXES, "float32")


@pytest.fixture(scope="module")
def of_text(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    calls = [texts(2, 53), texts(3, 7)]
    return write(tmp_path_factory.mktemp("segments") / "text", text_model(), calls, TEXT_AXES, "float32")


@pytest.mark.parametrize("runtime", get_args(Runtime))
def test_segments_of_an_image_classifier_are_the_model(of_images: Artifact, runtime: Runtime) -> None:
    check_chain(of_images, image_model(), [images(1), images(5)], runtime)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", get_args(Runtime))
def test_segments_of_a_text_classifier_are_the_model(of_text: Artifact, runtime: Runtime) -> None:
    check_chain(of_text, text_model(), [texts(1, 1), texts(3, 131), texts(2, 64)], runtime)


def check_chain(artifact: Artifact, model: Any, calls: list[dict[str, torch.Tensor]], runtime: Runtime) -> None:
    steps = SegmentSteps(artifact, "float32", runtime, threads=1)
    assert steps.num_segments == len(artifact.manifest.families["float32"])
    for probe in segment_probes(model, calls):
        given: Any = dict(probe.inputs)
        for number in range(steps.num_segments):
            given, logits = steps.run(number, given)
            wanted = np.asarray(probe.outputs["logits"], np.float32)[:, number]
            np.testing.assert_allclose(logits, wanted, atol=2e-5)


def test_no_weight_is_stored_twice(of_images: Artifact) -> None:
    files = [of_images.file(segment_file("float32", number)) for number in range(3)]
    bytes_of = [
        sum(len(one.raw_data) for one in onnx.load(path).graph.initializer)
        for path in (*files, of_images.file(MODEL_FILE))
    ]
    head = 4 * (24 * 5 + 5 + 2 * 24)
    assert abs(sum(bytes_of[:3]) - 2 * head - bytes_of[3]) < 7_000


@pytest.mark.slow
def test_int8_segments_answer_as_the_rounded_model(tmp_path: Path) -> None:
    model = text_model()
    rounded = freeze(
        quantize(
            model,
            QuantizeConfig(),
            [texts(2, 53), texts(3, 17)],
            lambda own, call: own(call["input_ids"], padding_mask=call["attention_mask"] == 0, return_exits=True),
        )
    )
    artifact = write(tmp_path / "int8", rounded.eval(), [texts(2, 53)], TEXT_AXES, "int8")
    steps = SegmentSteps(artifact, "int8", "onnxruntime", threads=1)
    assert any("Integer" in kind or kind.startswith("QLinear") for kind in steps.kernels().values())
    (probe,) = segment_probes(rounded, [texts(2, 61)])  # type: ignore[arg-type]
    given: Any = dict(probe.inputs)
    for number in range(2):
        given, logits = steps.run(number, given)
        wanted = np.asarray(probe.outputs["logits"], np.float32)[:, number]
        assert np.abs(logits - wanted).max() <= 2e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_one_graph_with_branches_leaves_where_the_margin_suffices(
    of_images: Artifact, tmp_path: Path, runtime: str
) -> None:
    calls = [images(1) for _ in range(24)]
    expected = [np.asarray(one.outputs["logits"])[0] for one in segment_probes(image_model(), calls)]
    margins = np.array([[np.diff(np.sort(logits)[-2:])[0] for logits in sample] for sample in expected])
    middle = np.median(margins, axis=0)
    for least in ([*middle], [*middle[:2], 0.0], [0.0, 0.0, 0.0], [1e9, 1e9, 1e9]):
        path = export_branches(of_images, "float32", [float(one) for one in least], tmp_path / "branches.onnx")
        run = opened(path, runtime)
        seen = set()
        for call, sample, own in zip(calls, expected, margins, strict=True):
            segments = next((number for number in range(3) if own[number] >= least[number]), 3)
            logits, count = run(call["pixels"].numpy())
            # behind the last segment stands the whole model, which here gives the last one's answer
            np.testing.assert_allclose(logits[0], sample[min(segments, 2)], atol=2e-5)
            assert count.tolist() == [[1, 2, 3, 0][segments]]
            seen.add(segments)
        assert len(seen) == 1 if least[0] in (0.0, 1e9) else len(seen) >= 3


def opened(path: Path, runtime: str) -> Any:
    if runtime == "onnxruntime":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(["logits", "segments_run"], {"pixels": pixels})
    compiled = openvino_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: [compiled([pixels])[name].copy() for name in ("logits", "segments_run")]


def test_branches_keep_no_graph_that_never_runs(of_images: Artifact, tmp_path: Path) -> None:
    sizes = [
        export_branches(of_images, "float32", least, tmp_path / "a.onnx").stat().st_size
        for least in ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    ]
    assert sizes[0] < 0.7 * sizes[1] < 0.5 * sizes[2]


# error messages


def test_margins_that_are_not_one_a_segment(of_images: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 margins were given for the 3 segments of float32"):
        export_branches(of_images, "float32", [1.0, 1.0], tmp_path / "a.onnx")


def test_a_segment_that_is_not_there(of_images: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"has no segment 4 of 'float32'; its families are: float32 with 3"):
        of_images.segment("float32", 3)
    with pytest.raises(ArtifactError, match=r"has no segment 1 of 'int8'"):
        of_images.segment("int8", 0)


@pytest.mark.parametrize(
    ("families", "words"),
    [
        ([], "families is no table with plain names"),
        ({"../up": []}, "families is no table with plain names"),
        ({"int8": []}, "the family 'int8' has no segments"),
        ({"int8": [{"inputs": {}}]}, "segment 1 of int8 has no inputs and outputs"),
        ({"int8": [{"inputs": {}, "outputs": {}}]}, "segment 1 of int8, inputs is no table of tensors"),
    ],
)
def test_families_that_are_none(of_images: Artifact, families: Any, words: str) -> None:
    values = json.loads((of_images.path / MANIFEST_FILE).read_text())["config"]
    with pytest.raises(ArtifactError, match=words):
        Manifest.from_dict(values | {"families": families})


def test_a_segment_file_that_is_missing_or_changed(of_images: Artifact, tmp_path: Path) -> None:
    source = of_images.path
    for change in ("missing", "changed"):
        folder = tmp_path / change
        folder.mkdir()
        for path in source.iterdir():
            copy(path, folder / path.name)
        path = folder / segment_file("float32", 1)
        if change == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"\x00")
        with pytest.raises(ArtifactError, match=r"float32-2\.onnx"):
            read_artifact(folder)
