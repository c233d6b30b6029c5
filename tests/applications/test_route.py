"""Routing from end to end on small images: the artifact, its certificate, its explanations, what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.applications.images.tiny import LABELS, RECIPE, make_image, train_tiny, write_images
from trilevel.applications.artifacts import load
from trilevel.applications.images.recipe import Schedule
from trilevel.applications.route import Options, Routing, route
from trilevel.applications.route_family import default_plan, make_family
from trilevel.applications.route_outcomes import Machine, open_statics
from trilevel.artifact.audited import AuditedPredictor
from trilevel.artifact.check import default_runtime
from trilevel.artifact.export.attention import NAME
from trilevel.artifact.manifest import CERTIFICATE_FILE, read_artifact, write_artifact
from trilevel.artifact.platform import isa_class
from trilevel.artifact.routed import RoutedPredictor, read_certificate, read_router
from trilevel.artifact.runtime.predictor import load_predictor
from trilevel.attention.library import is_available
from trilevel.cli.main import app
from trilevel.compression.exits import ExitsConfig
from trilevel.compression.plan import CompressionPlan, Recovery, Stage
from trilevel.compression.quantize import QuantizeConfig
from trilevel.errors import ArtifactError, CertificateError, ConfigError, InputError
from trilevel.routing.targets import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TARGETS = (Target(kind="harm", alpha=0.05),)
PLAN = CompressionPlan(
    stages=(
        Stage(name="exits", config=ExitsConfig(segments=2), recovery=Recovery(steps=60)),
        Stage(name="quantize", config=QuantizeConfig(), recovery=Recovery(steps=5)),
    )
)
MACHINE = Machine(runtime="onnxruntime", threads=1)
SILENT: dict[str, Any] = {"show_progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("route")
    train_tiny(made, recipe=replace(RECIPE, schedule=Schedule(steps=120)))
    write_images(made / "held", 400, seed=7)
    return made


@pytest.fixture(scope="module")
def routed(folder: Path) -> Routing:
    return route(
        folder / "run",
        folder / "held",
        folder / "artifact",
        Options(targets=TARGETS, budget_s=1.0),
        plan=PLAN,
        machine=MACHINE,
        **SILENT,
    )


def pixels(count: int) -> np.ndarray:
    return np.stack([make_image(LABELS[seed % 2], 90_000 + seed)[None] for seed in range(count)])


def test_the_artifact_is_certified_and_answers(routed: Routing, folder: Path) -> None:
    artifact = routed.artifact
    assert routed.report["is_certified"]
    assert routed.report["samples"] == {"tune": 200, "prove": 400, "test": 200}
    assert {row["kind"] for row in routed.report["rows"]} == {"fixed", "dynamic", "random", "oracle", "rival"}
    certificate = read_certificate(artifact, read_router(artifact))
    assert certificate is not None
    assert certificate.platform.isa == isa_class()
    assert certificate.proofs[0].target == "harm:0.05"
    model = load(folder / "artifact", runtime="onnxruntime", threads=1)
    files = sorted((folder / "held").rglob("*.png"))[:30]
    found = model.predict(files)
    assert np.mean([one.label == path.parent.name for one, path in zip(found, files, strict=True)]) > 0.8
    assert "Certified" in (artifact.path / "report.html").read_text()
    # what was made on the way is taken from there, and the same certificate comes out
    again = route(
        folder / "run",
        folder / "held",
        folder / "again",
        Options(targets=TARGETS, budget_s=1.0),
        plan=PLAN,
        machine=MACHINE,
        work=folder / "artifact.work",
        **SILENT,
    )
    assert again.report["rows"] == routed.report["rows"]


def test_a_sample_gets_what_it_gets_alone(routed: Routing) -> None:
    given = pixels(38)
    # between two of the margins, so that one half leaves and the other stays
    first = {"int8/start": 1.0, "int8/1": 0.0, "int8/2": 0.0}
    trial = RoutedPredictor(routed.artifact, "onnxruntime", threads=1, setting=first)
    middle = float(np.median([one.margin for one in trial.route({"pixels": given})]))
    setting = first | {"int8/1": middle}
    predictor = RoutedPredictor(routed.artifact, "onnxruntime", threads=1, setting=setting)
    together = predictor.route({"pixels": given})
    assert {one.path for one in together} == {"int8/1", "int8/2"}
    for row in range(len(given)):
        (alone,) = predictor.route({"pixels": given[row : row + 1]})
        assert alone.path == together[row].path
        np.testing.assert_allclose(alone.output, together[row].output, atol=1e-5)


def test_another_platform_takes_the_full_path_and_says_so(
    routed: Routing, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trilevel.artifact.routed.isa_class", lambda: "amx_int8")
    with caplog.at_level(logging.WARNING):
        model = load(folder / "artifact", runtime="onnxruntime", threads=1)
    assert f"isa {isa_class()} and here amx_int8, so every input takes the full path" in caplog.text
    assert "trilevel certify" in caplog.text
    predictor = RoutedPredictor(routed.artifact, "onnxruntime", threads=1)
    assert {one.path for one in predictor.route({"pixels": pixels(5)})} == {"float32/1"}
    assert model.predict([next((folder / "held").rglob("*.png"))])[0].label in LABELS
    done = CliRunner().invoke(app, ["route-explain", str(folder / "artifact"), "x.png", "--runtime", "onnxruntime"])
    assert done.exit_code == 2


def test_thresholds_edited_by_hand_are_refused(routed: Routing, folder: Path) -> None:
    shutil.copytree(folder / "artifact", folder / "edited")
    path = folder / "edited" / CERTIFICATE_FILE
    values = json.loads(path.read_text())
    values["setting"]["int8/1"] = 0.0
    path.write_text(json.dumps(values))
    # the artifact's own hash says it first
    with pytest.raises(ArtifactError, match=r"certificate\.json"):
        read_artifact(folder / "edited")
    artifact = replace(routed.artifact, hashes={**routed.artifact.hashes, "int8-1.onnx": "0" * 64})
    with pytest.raises(CertificateError, match="of another model than what is here"):
        read_certificate(artifact, read_router(routed.artifact))


def test_verify_runs_the_segments_too(folder: Path, routed: Routing) -> None:
    done = CliRunner().invoke(app, ["verify", str(folder / "artifact"), "--runtime", "onnxruntime", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output.strip().splitlines()[-1])["rows"]
    assert [row["family"] for row in rows] == ["", "int8"]
    assert all(row["holds"] for row in rows)


def test_explanations(folder: Path, routed: Routing) -> None:
    path = str(next((folder / "held").rglob("*.png")))
    options = ["route-explain", str(folder / "artifact"), path, "--runtime", "onnxruntime", "--threads", "1"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "the full path takes" in done.output
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert found["source"] == path
    assert found["path"] in ("int8/1", "int8/2", "float32/1")
    predictor = RoutedPredictor(routed.artifact, "onnxruntime", threads=1)
    # one row of the same file
    assert found["full_ms"] > 0
    assert predictor.rule is not None


def test_the_bench_of_paths(folder: Path, routed: Routing) -> None:
    write_images(folder / "bench" / "train", 30, seed=3)
    write_images(folder / "bench" / "test", 150, seed=29)
    options = ["bench", "paths", "--task", f"{folder / 'artifact'}={folder / 'bench'}", "--smoke", "--json"]
    done = CliRunner().invoke(app, [*options, "--threads", "1"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output.strip().splitlines()[-1])
    assert [row["batch"] for row in report["rows"]] == [1, 8]
    (task,) = report["measurements"]
    assert task["same_alone"]
    assert task["loss"] <= 0.05
    assert [row["noise"] for row in task["drift"]] == [0, 16, 32, 64]


def test_certified_anew_on_another_runtime_beside_other_models(
    folder: Path, routed: Routing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trilevel.applications.route_outcomes.has_bfloat16_products", lambda: True)
    shutil.copytree(folder / "artifact", folder / "other")
    write_images(folder / "fresh", 300, seed=11)
    done = CliRunner().invoke(
        app,
        [
            *("certify", str(folder / "other"), str(folder / "fresh"), "--runtime", "openvino", "--threads", "1"),
            *("--static", str(folder / "artifact.work" / "whole"), "--max-loss", "0.05", "--json"),
        ],
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.output.strip().splitlines()[-1])
    assert report["is_certified"]
    artifact = read_artifact(folder / "other")
    certificate = read_certificate(artifact, read_router(artifact))
    assert certificate is not None
    assert certificate.platform.runtime == "openvino"
    rows = {row["name"]: row for row in report["rows"]}
    assert {name for name, row in rows.items() if row["kind"] == "static"} == {"whole", "full path in bfloat16"}
    # the run itself, as an artifact of its own
    assert (rows["whole"]["loss"], rows["whole"]["is_proved"]) == (0.0, True)
    assert rows["full path in bfloat16"]["loss"] <= 0.05
    assert rows["whole"]["ms"]["1"] > 0
    assert "full path in bfloat16" in (folder / "other" / "report.html").read_text()


def test_models_that_cannot_be_compared(folder: Path, routed: Routing) -> None:
    whole = folder / "artifact.work" / "whole"
    other = read_artifact(whole)
    labels = {**other.manifest.settings, "labels": list(reversed(LABELS))}
    files = {name: partial(shutil.copyfile, other.file(name)) for name in other.hashes}
    write_artifact(folder / "labels", replace(other.manifest, settings=labels), files)
    with pytest.raises(InputError, match="labels has other labels than the model that is routed"):
        open_statics(routed.artifact, MACHINE, [folder / "labels"])
    with pytest.raises(InputError, match="two static models are named 'whole'"):
        open_statics(routed.artifact, MACHINE, [whole, whole])


def changed(predictor: RoutedPredictor, given: np.ndarray) -> float:
    """Share of the answers that differ from the full path's."""
    routed, full = predictor.route({"pixels": given}), predictor.whole.run({"pixels": given})["logits"]
    return float(np.mean([one.output.argmax() != own.argmax() for one, own in zip(routed, full, strict=True)]))


def test_an_audit_finds_images_that_changed(folder: Path, routed: Routing, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # leaves behind the first segment whatever it says, as a certificate of other images would let it
    setting = {"int8/start": 1.0, "int8/1": 0.0, "int8/2": 0.0}
    predictor = RoutedPredictor(routed.artifact, "onnxruntime", threads=1)
    assert predictor.rule is not None
    predictor.rule = replace(predictor.rule, setting=setting)
    audited = AuditedPredictor(predictor, tmp_path / "audit.json")
    clean = pixels(200)
    # little is left of them
    noisy = np.clip(clean * 0.1 + rng.integers(0, 230, clean.shape), 0, 255).astype(np.uint8)
    calm, moved = changed(predictor, clean), changed(predictor, noisy)
    assert calm <= audited.audit.config.alpha < 0.1 <= moved
    for start in range(0, 10_000, 200):
        audited.run({"pixels": clean}, ids=[f"calm-{start + row}" for row in range(200)])
    assert not audited.audit.is_alarmed
    for start in range(0, 10_000, 200):
        audited.run({"pixels": noisy}, ids=[f"moved-{start + row}" for row in range(200)])
    assert audited.audit.is_alarmed
    assert {one.path for one in predictor.route({"pixels": noisy[:5]})} == {"float32/1"}


# what is refused


def test_known_samples(folder: Path, routed: Routing) -> None:
    shutil.copytree(folder / "images", folder / "known")
    for path in write_images(folder / "more", 40, seed=23).rglob("*.png"):
        shutil.copy(path, folder / "known" / path.parent.name / f"more-{path.name}")
    options = Options(targets=TARGETS, budget_s=1.0)
    arguments: dict[str, Any] = {"plan": PLAN, "machine": MACHINE, "work": folder / "artifact.work", **SILENT}
    with pytest.raises(InputError, match="are among those that the model was trained on"):
        route(folder / "run", folder / "known", folder / "no", options, **arguments)
    assert not (folder / "no").exists()
    # the artifact knows them too
    shutil.copytree(folder / "artifact", folder / "own")
    done = CliRunner().invoke(app, ["certify", str(folder / "own"), str(folder / "images"), "--runtime", "onnxruntime"])
    assert done.exit_code == 2
    assert "are among those that the model was trained on" in done.stderr
    found = route(folder / "run", folder / "known", folder / "few", replace(options, drop_known=True), **arguments)
    assert not found.report["is_certified"]
    assert "more samples" in found.report["promise"]
    model = load(folder / "few", runtime="onnxruntime", threads=1)
    assert model.predict([next((folder / "known").rglob("*.png"))])[0].label in LABELS


@pytest.mark.parametrize(("isa", "stages"), [("avx512_vnni", ["exits", "quantize"]), ("avx2", ["exits"])])
def test_cheap_paths_are_rounded_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, isa: str, stages: list[str]
) -> None:
    monkeypatch.setattr("trilevel.artifact.platform.isa_class", lambda: isa)
    assert [stage.name for stage in default_plan().stages] == stages


def test_exits_in_float_go_on_to_the_full_path(folder: Path, routed: Routing) -> None:
    found = route(
        folder / "run", folder / "held", folder / "float", Options(targets=TARGETS, budget_s=0.5),
        plan=replace(PLAN, stages=PLAN.stages[:1]), machine=MACHINE, work=folder / "float.work", **SILENT,
    )  # fmt: skip
    assert found.artifact.manifest.full_path == "float32/2"
    assert {row["name"] for row in found.report["rows"]} >= {"float32/1", "float32/2", "ours"}
    setting = {"float32/start": 1.0, "float32/1": 1e9}
    predictor = RoutedPredictor(found.artifact, "onnxruntime", threads=1, setting=setting)
    given = pixels(9)
    deep = predictor.route({"pixels": given})
    # nobody began anew, and the end of the segments is the graph that stands beside them
    assert {(one.path, one.segments_run) for one in deep} == {("float32/2", 2)}
    whole = load_predictor(found.artifact, "onnxruntime", threads=1).run({"pixels": given})["logits"]
    np.testing.assert_allclose(np.stack([one.output for one in deep]), whole, atol=1e-4)
    np.testing.assert_allclose(predictor.whole.run({"pixels": given})["logits"], whole, atol=1e-4)
    shallow = RoutedPredictor(found.artifact, "onnxruntime", threads=1, setting=setting | {"float32/1": 0.0})
    assert {one.path for one in shallow.route({"pixels": given})} == {"float32/1"}
    load(folder / "float", runtime="onnxruntime", threads=1)


def test_attention_by_the_native_kernels(folder: Path, routed: Routing) -> None:
    if not is_available():
        pytest.skip("no native kernels are built")
    # what was trained is taken from there
    shutil.copytree(folder / "artifact.work" / "model", folder / "native.work" / "model")
    found = route(
        folder / "run", folder / "held", folder / "native",
        Options(targets=TARGETS, budget_s=0.5, target="native", statics=(folder / "artifact.work" / "whole",)),
        plan=PLAN, machine=MACHINE, **SILENT,
    )  # fmt: skip
    assert found.artifact.manifest.target == "native"
    assert Machine(runtime=default_runtime(found.artifact)).runtime == "onnxruntime"
    setting = {"int8/start": 1.0, "int8/1": 1e9, "int8/2": 0.0}
    ours, theirs = (
        RoutedPredictor(artifact, "onnxruntime", threads=1, setting=setting)
        for artifact in (found.artifact, routed.artifact)
    )
    assert list(ours.steps["int8"].kernels().values()).count(NAME) == 2
    given = pixels(9)
    for one, other in zip(ours.route({"pixels": given}), theirs.route({"pixels": given}), strict=True):
        assert one.path == other.path == "int8/2"
        np.testing.assert_allclose(one.output, other.output, atol=1e-4)
    # the portable graph of the same run answers the same
    (whole,) = (row for row in found.report["rows"] if row["kind"] == "static")
    assert whole["loss"] == 0.0
    done = CliRunner().invoke(app, ["verify", str(folder / "native"), "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output.strip().splitlines()[-1])["rows"]
    # in one runtime, the only one that can
    assert [(row["family"], row["holds"]) for row in rows] == [("", True), ("int8", True)]
    path = str(next((folder / "held").rglob("*.png")))
    done = CliRunner().invoke(app, ["route-explain", str(folder / "native"), path, "--threads", "1"])
    assert done.exit_code == 0, done.output


def test_plans_and_models_that_make_no_paths(folder: Path, routed: Routing) -> None:
    arguments: dict[str, Any] = {"seed": 0, "limit": None, "progress": lambda *_: None, "tell": print, **SILENT}
    plain = replace(PLAN, stages=PLAN.stages[1:])
    with pytest.raises(ConfigError, match=r"the plan has the stages quantize; paths need \[exits\]"):
        make_family(folder / "run", None, plain, folder / "work", **arguments)
    with pytest.raises(ConfigError, match="must be a float image or text classifier without exits"):
        make_family(folder / "artifact.work" / "model", None, PLAN, folder / "work", **arguments)
    with pytest.raises(InputError, match="an artifact knows no data"):
        route(folder / "artifact", None, folder / "no", Options(targets=TARGETS), machine=MACHINE)
    with pytest.raises(ConfigError, match=r"confidence=1 must lie between 0 and 1"):
        Options(targets=TARGETS, confidence=1)
    with pytest.raises(ConfigError, match="no target: say what is promised"):
        Options(targets=())
    done = CliRunner().invoke(app, ["route", str(folder / "run"), "d", "o", "--target", "harms:0.1"])
    assert done.exit_code == 2
    assert "target 'harms' is unknown" in done.stderr
