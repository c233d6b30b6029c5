"""An artifact gives the records that torch gives, in every runtime, without torch; bad input and damage are named."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import trilevel
from tests.artifact import tasks
from tests.artifact.test_manifest import sealed
from trilevel.applications import artifacts
from trilevel.applications.classification.predict import predict as torch_predict
from trilevel.applications.classification.predictions import Item
from trilevel.applications.images.artifact import export_images
from trilevel.applications.images.predict import predict as torch_images
from trilevel.artifact.check import Checked, default_runtime, installed
from trilevel.artifact.export import artifact as exporting
from trilevel.artifact.manifest import MANIFEST_FILE, MODEL_FILE, Artifact, read_artifact, write_artifact
from trilevel.artifact.runtime.predictor import Runtime
from trilevel.compression.quantize import QuantizeConfig, freeze, quantize
from trilevel.conversion.embedder import Embedder
from trilevel.errors import ArtifactError, CheckpointError, ConfigError, InputError, MissingExtraError

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
Made = Callable[[str], Artifact]


def load(artifact: Artifact, runtime: Runtime = "onnxruntime", **options: Any) -> artifacts.Model:
    return trilevel.load(artifact.path, runtime=runtime, threads=1, **options)


@pytest.fixture
def copied(task_artifact: Made, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return Path(shutil.copytree(task_artifact("classification").path, tmp_path / "copied"))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_vectors_are_torch_s(task_artifact: Made, runtime: Runtime) -> None:
    model = load(task_artifact("embedding"), runtime)
    found = model.predict(tasks.TEXTS)
    np.testing.assert_allclose(found, Embedder(tasks.source()).embed(tasks.TEXTS).numpy(), atol=1e-6)
    assert found.dtype == np.float32
    # alone as among others
    np.testing.assert_allclose(model.predict(tasks.TEXTS[3:4]), found[3:4], atol=1e-6)
    assert model.predict([]).shape == (0, 30)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("kind", "tolerance"), [("classification", 1e-5), ("int8", 2e-2)])
def test_classes_of_texts_are_torch_s(task_artifact: Made, runtime: Runtime, kind: str, tolerance: float) -> None:
    run = tasks.text_run(is_int8=kind == "int8")
    wanted = list(torch_predict(run, iter([Item(where="", text=text.strip()) for text in tasks.TEXTS])))
    found = load(task_artifact(kind), runtime).predict(tasks.TEXTS)
    assert [one.label for one in found] == [one.label for one in wanted]
    assert [one.item for one in found] == [one.item for one in wanted]
    assert found[1].probabilities is None
    for one, other in zip(found, wanted, strict=True):
        assert (one.probabilities or {}) == pytest.approx(other.probabilities or {}, abs=tolerance)


def test_a_graph_holds_little_beside_its_weights(task_artifact: Made) -> None:
    onnx, artifact = pytest.importorskip("onnx"), task_artifact("images")
    graph = onnx.load(str(artifact.file(MODEL_FILE))).graph
    numbers = [
        int(np.prod(constant.dims)) for constant in graph.initializer if constant.data_type == onnx.TensorProto.INT64
    ]
    assert max(numbers) <= 1_024
    assert not any(node.name for node in graph.node)
    stored = {constant.name for constant in graph.initializer}
    assert all(value.name in stored for value in graph.value_info)
    # two blocks with a head of each class
    assert sum(node.ByteSize() for node in graph.node) <= 25_000


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("kind", "tolerance"), [("images", 1e-5), ("small-images", 2e-2)])
def test_classes_of_images_are_torch_s(
    task_artifact: Made, runtime: Runtime, kind: str, tolerance: float, tmp_path: Path
) -> None:
    paths = tasks.write_pictures(tmp_path / "pictures")
    run = tasks.image_run() if kind == "images" else tasks.small_image_run()
    found, wanted = load(task_artifact(kind), runtime).predict(paths), list(torch_images(run, paths))
    for one, other in zip(found, wanted, strict=True):
        assert (one.path, one.label) == (other.path, other.label)
        assert one.probabilities == pytest.approx(other.probabilities, abs=tolerance)


def test_what_an_artifact_says(task_artifact: Made) -> None:
    found = {kind: task_artifact(kind) for kind in ("embedding", "classification", "int8", "images")}
    assert [own.manifest.precision for own in found.values()] == ["float32", "float32", "int8", "float32"]
    assert [own.manifest.target for own in found.values()] == [None, None, "portable", None]
    assert found["images"].manifest.levels["window"] == 5
    for own in found.values():
        report = json.loads(own.file("report.json").read_text())
        assert report["bytes"][MODEL_FILE] == own.bytes_of(MODEL_FILE)
        assert {row["runtime"] for row in report["parity"]} == set(RUNTIMES)
        assert all(row["holds"] for row in report["parity"])
        assert own.manifest.name in own.file("MODEL_CARD.md").read_text()
        # where it was made is nobody's business
        assert str(Path(trilevel.__file__).parent).encode() not in own.file(MODEL_FILE).read_bytes()


def test_integers_are_stored_once(task_artifact: Made) -> None:
    assert json.loads(task_artifact("int8").file("report.json").read_text())["parity"][0]["integer_kernels"] > 5
    assert load(task_artifact("int8"), "torch").parity.difference < 1e-5


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_no_torch_is_imported(task_artifact: Made, tmp_path: Path, runtime: str) -> None:
    paths = list(map(str, tasks.write_pictures(tmp_path / "pictures")))
    inputs = {"embedding": tasks.TEXTS, "classification": tasks.TEXTS, "images": paths}
    folders = [(str(task_artifact(kind).path), given) for kind, given in inputs.items()]
    code = f"""
import sys, trilevel
for folder, inputs in {folders!r}:
    assert len(trilevel.load(folder, runtime={runtime!r}, threads=1).predict(inputs)) == len(inputs)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_inputs_that_cannot_be_used(task_artifact: Made, tmp_path: Path) -> None:
    for kind in ("embedding", "classification"):
        model = load(task_artifact(kind))
        with pytest.raises(InputError, match="texts is one text"):
            model.predict("fine")
        with pytest.raises(InputError, match=r"texts\[1\] is a int"):
            model.predict(["fine", 7])
    with pytest.raises(InputError, match=r"text 1 has 132 tokens and tiny reads 97"):
        load(task_artifact("embedding")).predict(["fine", "w3 " * 130])
    images = load(task_artifact("images"))
    with pytest.raises(InputError, match="is one path"):
        images.predict("a.png")
    with pytest.raises(InputError, match="not a readable image"):
        images.predict([tmp_path / "nothing.png"])
    assert images.predict([]) == []


def test_the_runtime_is_chosen_or_asked_for(task_artifact: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = task_artifact("images")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert trilevel.load(artifact.path, threads=1).runtime == "openvino"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert trilevel.load(artifact.path, threads=1).runtime == default_runtime() == "onnxruntime"
    assert "onnxruntime" in repr(load(artifact))
    assert installed() == list(RUNTIMES)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="onnxruntime"):
        load(artifact)
    with pytest.raises(ConfigError, match="threads=0"):
        trilevel.load(artifact.path, threads=0)
    with pytest.raises(ConfigError, match="'tpu' is unknown"):
        load(artifact, "tpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="torch' runs in float32"):
        load(artifact, "torch", precision="bfloat16")


def test_every_damaged_file_is_refused(copied: Path) -> None:
    count = 0
    for path in sorted(copied.iterdir()):
        whole = path.read_bytes()
        pieces = [whole[: len(whole) // 2], whole[:-1], b""]
        for place in range(0, len(whole), 997):
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            pieces.append(bytes(damaged))
        for piece in pieces:
            path.write_bytes(piece)
            with pytest.raises(ArtifactError):
                trilevel.load(copied, runtime="onnxruntime", threads=1)
            count += 1
        path.write_bytes(whole)
    assert count > 60
    trilevel.load(copied, runtime="onnxruntime", threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=7), "format version 7"),
        (lambda v: v["files"].update({"../evil": "0"}), "lists '../evil'"),
        (lambda v: v["config"].update(task="poems"), "is for 'poems'; this trilevel knows"),
        (lambda v: v["config"].update(settings={"labels": ["a", "b", "c"]}), "settings are none of classification"),
        (lambda v: v["config"]["settings"].update(labels=["a"]), "labels are not as many"),
        (lambda v: v["config"]["settings"].update(max_tokens="many"), "settings are none"),
        (lambda v: v["config"].update(task="images"), "settings are none of images"),
    ],
)
def test_a_manifest_that_does_not_fit(copied: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    sealed(copied, change)
    with pytest.raises(ArtifactError, match=message):
        trilevel.load(copied, runtime="onnxruntime", threads=1)


def test_other_weights_are_seen_by_the_probes(task_artifact: Made, tmp_path: Path) -> None:
    artifact = task_artifact("classification")
    data = bytearray(artifact.file(MODEL_FILE).read_bytes())
    head = tasks.text_run().model.head.weight.detach().T.contiguous().numpy().tobytes()
    place = bytes(data).find(head[:24])
    place = bytes(data).find(tasks.text_run().model.head.weight.detach().numpy().tobytes()[:24]) if place < 0 else place
    assert place > 0
    data[place : place + 4] = np.float32(9).tobytes()
    files: dict[str, Callable[[Path], Any]] = {
        name: partial(shutil.copyfile, artifact.file(name)) for name in artifact.hashes
    }
    other = write_artifact(
        tmp_path / "other", artifact.manifest, files | {MODEL_FILE: lambda path: path.write_bytes(data)}
    )
    for runtime in RUNTIMES:
        with pytest.raises(ArtifactError, match="gives other answers"):
            load(other, runtime)


def test_what_is_not_exported(tmp_path: Path) -> None:
    run = tasks.image_run()
    broken = tasks.image_run.__wrapped__()
    with torch.no_grad():
        broken.model.head.logits.weight[0, 0] = float("nan")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"head\.logits\.weight holds values that are no finite"):
        export_tiny(broken, out)
    with pytest.raises(ConfigError, match="target='tpu' is unknown; known are portable, cpu"):
        export_tiny(run, out, target="tpu")
    batches = [torch.randint(0, 256, (2, 1, *tasks.SIZE), dtype=torch.uint8) for _ in range(3)]
    unsigned: Any = freeze(quantize(run.model, QuantizeConfig(activations="uint8"), batches))
    with pytest.raises(ConfigError, match="Export with --target cpu"):
        export_tiny(replace(run, model=unsigned), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    with pytest.raises(ArtifactError, match="is no artifact; it is left alone"):
        export_tiny(run, tmp_path / "mine")
    assert not out.exists()


def export_tiny(run: Any, out: Path, target: str = "portable") -> Artifact:
    return export_images(run, out, target=target, tell=tasks.quiet)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["export_onnx", "write_artifact"])
def test_an_export_that_fails_leaves_the_old_artifact(
    copied: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    before = read_artifact(copied)
    if where == "write_artifact":
        tensors = before.manifest.inputs, before.manifest.outputs

        def export_nothing(*given: Any, **_: Any) -> Any:
            given[3].write_bytes(b"")
            return tensors

        monkeypatch.setattr(exporting, "export_onnx", export_nothing)
        monkeypatch.setattr(exporting, "check_runtimes", lambda *_, **__: [])
        monkeypatch.setattr(exporting, "_require_answers", lambda _: None)
        monkeypatch.setattr(exporting, "_write", fail)
    else:
        monkeypatch.setattr(exporting, where, fail)
    kind: Any = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind, match="No space left.*unchanged" if kind is ArtifactError else None):
        export_tiny(tasks.image_run(), copied)
    assert read_artifact(copied).hashes == before.hashes
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
    assert (copied / MANIFEST_FILE).is_file()


def test_an_artifact_that_no_runtime_agrees_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [Checked(runtime="openvino", precision="float32", error="it cannot")]
    monkeypatch.setattr(exporting, "check_runtimes", lambda *_, **__: wrong)
    monkeypatch.setattr(exporting, "_draft", lambda *_: None)
    with pytest.raises(ArtifactError, match="no runtime gives torch's answers: openvino: it cannot"):
        export_tiny(tasks.image_run(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
