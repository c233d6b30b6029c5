"""Routing a summariser from end to end, on an encoder of random weights: segments, focus, grades, promises."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.applications.documents.conftest import ABSTRACT, TEXT
from tests.applications.documents.tiny_encoder import save_pretrained, save_small_converted
from trilevel.applications.artifacts import load
from trilevel.applications.documents.artifact import graph_inputs
from trilevel.applications.documents.encoded import encode
from trilevel.applications.documents.recipe import MINILM_RECIPE, BackboneSize, load_recipe, train
from trilevel.applications.documents.routing import load_samples
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.applications.route import Options, Routing, route
from trilevel.applications.route_outcomes import Machine
from trilevel.artifact.audited import AuditedPredictor
from trilevel.artifact.export.branches import export_branches
from trilevel.artifact.routed import RoutedPredictor
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.cli.main import app
from trilevel.compression.exits import ExitsConfig
from trilevel.compression.plan import CompressionPlan, Recovery, Stage
from trilevel.compression.quantize import QuantizeConfig
from trilevel.errors import ConfigError, InputError
from trilevel.routing.targets import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PLAN = CompressionPlan(
    stages=(
        Stage(name="exits", config=ExitsConfig(after=(1,), focus=0.3), recovery=Recovery(steps=6)),
        Stage(name="quantize", config=QuantizeConfig()),
    )
)
MACHINE = Machine(runtime="onnxruntime", threads=1)
# of few kinds: it is exported three times, and each kind of heads costs the exporter seconds in each block
CLASSES = np.array([[3, 0, 0], [2, 0, 1], [3, 0, 0]])
FULL, FIRST, LAST = "float32/1", "int8/1/focus=0.3", "int8/2/focus=0.3"


def documents(path: Path, counts: dict[str, int], *, seed: int = 0, has_abstracts: bool = True) -> Path:
    """Lines of the test document in another order each, some of them long enough for focus."""
    rng, lines, rows = np.random.default_rng(seed), TEXT.split("\n"), []
    for split, count in counts.items():
        for number in range(count):
            text = "\n".join(lines[place] for _ in range(1 + 9 * (number % 2)) for place in rng.permutation(len(lines)))
            row = {"id": f"{split}{number}", "title": "Levels", "text": text, "split": split}
            rows.append(row | ({"abstract": ABSTRACT} if has_abstracts else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("route")
    documents(made / "docs" / "tech.jsonl", {"train": 12, "valid": 90, "test": 20})
    encoder = save_small_converted(made / "converted", save_pretrained(made / "pretrained", TEXT), CLASSES)
    full = load_recipe(MINILM_RECIPE)
    assert isinstance(full.model, BackboneSize)
    recipe = dataclasses.replace(
        full,
        data=dataclasses.replace(full.data, set="docs/tech.jsonl"),
        model=dataclasses.replace(full.model, word_dim=3, dim=24, num_heads=3, bfloat16=False),
        train=dataclasses.replace(full.train, steps=4, warmup_steps=1, checkpoint_every=4),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRILEVEL_CACHE", str(made / "cache"))
        train(recipe, out_dir=made / "run", data_root=made, encoder=encoder, show_progress=False)
    return made


def routed_as(folder: Path, name: str, target: str, **changes: Any) -> Routing:
    kind, _, alpha = target.partition(":")
    options = Options(targets=(Target(kind=kind, alpha=float(alpha)),), budget_s=0.5)  # type: ignore[arg-type]
    arguments: dict[str, Any] = {"plan": PLAN, "machine": MACHINE, "work": folder / "work", "show_progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRILEVEL_CACHE", str(folder / "cache"))
        return route(folder / "run", folder / "docs" / "tech.jsonl", folder / name, options, **(arguments | changes))


@pytest.fixture(scope="module")
def routed(folder: Path) -> Routing:
    return routed_as(folder, "artifact", "drop:0.2")


def test_the_artifact_is_certified_and_summarises(folder: Path, routed: Routing) -> None:
    report = routed.report
    assert report["samples"] == {"tune": 30, "prove": 60, "test": 20}
    assert report["is_certified"], report["promise"]
    assert {row["name"] for row in report["rows"]} >= {FULL, FIRST, LAST, "ours", "oracle"}
    assert all(-1 <= row["loss"] <= 1 for row in report["rows"])
    model = load(folder / "artifact", runtime="onnxruntime", threads=1)
    (summary,) = model.predict([TEXT])
    assert 0 < len(summary.sentences) < len(summary.units)
    done = CliRunner().invoke(app, ["verify", str(folder / "artifact"), "--runtime", "openvino", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output.strip().splitlines()[-1])["rows"]
    # the whole graph in both precisions of OpenVINO, then the segments
    assert [row["family"] for row in rows] == ["", "", "int8/focus=0.3"]


def test_paths_are_those_of_the_setting(folder: Path, routed: Routing) -> None:
    tokenizer = DocumentTokenizer(read_tokenizer(routed.artifact))
    inputs = graph_inputs([encode(split_units_of("\n".join([TEXT] * 12)), tokenizer)])
    # out of reach, but not what says that nobody may leave: no such family is begun
    never, found = 1e8, {}
    for path in (FIRST, LAST, FULL):
        setting = {"int8/focus=0.3/start": 1.0, FIRST: never, LAST: never}
        setting |= {path: 0.0} if path != FULL else {}
        (found[path],) = RoutedPredictor(routed.artifact, "onnxruntime", threads=1, setting=setting).route(inputs)
    assert [one.path for one in found.values()] == [FIRST, LAST, FULL]
    # behind the first segment some sentences are out
    assert (found[FIRST].output > -1e4).all()
    assert 0 < (found[LAST].output <= -1e4).sum() < len(found[LAST].output)
    assert found[FULL].is_restarted


def split_units_of(text: str) -> Any:
    from trilevel.data.documents import Document

    return split_units(Document(id="", title="", text=text))


def test_explanations_and_the_audit(folder: Path, routed: Routing, tmp_path: Path) -> None:
    file = tmp_path / "own.md"
    file.write_text(TEXT)
    options = ["route-explain", str(folder / "artifact"), str(file), "--runtime", "onnxruntime", "--threads", "1"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "sentences" in done.output
    assert "the full path takes" in done.output
    predictor = RoutedPredictor(routed.artifact, "onnxruntime", threads=1)
    with pytest.raises(ConfigError, match=r"promises drop:0\.2, how good they are"):
        AuditedPredictor(predictor, tmp_path / "audit.json")
    with pytest.raises(ConfigError, match="chooses sentences between its graphs, which no graph can"):
        export_branches(routed.artifact, "int8/focus=0.3", (0.0, 0.0, 0.0), tmp_path / "one.onnx")


def test_agreement_needs_no_abstracts_and_grades_do(folder: Path, routed: Routing) -> None:
    other = documents(folder / "bare.jsonl", {"test": 40}, seed=9, has_abstracts=False)
    samples = load_samples(routed.artifact, other)
    assert samples.judge is not None
    done = CliRunner().invoke(
        app, ["certify", str(folder / "artifact"), str(other), "--runtime", "onnxruntime", "--threads", "1"]
    )
    assert done.exit_code == 2
    assert "needs answers that are graded from 0 to 1" in done.stderr


# what is refused


def test_documents_that_were_learned_from(folder: Path, routed: Routing, tmp_path: Path) -> None:
    known = documents(tmp_path / "known.jsonl", {"train": 12, "test": 5})
    done = CliRunner().invoke(app, ["certify", str(folder / "artifact"), str(known), "--runtime", "onnxruntime"])
    assert done.exit_code == 2
    assert "are among those that the model was trained on" in done.stderr


def test_plans_of_classifiers(folder: Path) -> None:
    trained = dataclasses.replace(PLAN.stages[1], recovery=Recovery(steps=5))
    with pytest.raises(ConfigError, match=r"\[quantize\] without \[quantize.train\]: its encoder stays as"):
        routed_as(folder, "no", "drop:0.2", plan=dataclasses.replace(PLAN, stages=(PLAN.stages[0], trained)))
    dropped = dataclasses.replace(PLAN.stages[0], config=ExitsConfig(after=(1,), layer_dropout=0.1))
    with pytest.raises(ConfigError, match=r"layer_dropout=0\.1 is of classifiers"):
        routed_as(folder, "no", "drop:0.2", plan=dataclasses.replace(PLAN, stages=(dropped,)))
    with pytest.raises(InputError, match="no document of the split 'train'"):
        route(
            folder / "run",
            documents(folder / "none.jsonl", {"test": 3}),
            folder / "no",
            Options(targets=(Target(kind="drop", alpha=0.1),)),
            plan=PLAN,
            machine=MACHINE,
            show_progress=False,
        )
