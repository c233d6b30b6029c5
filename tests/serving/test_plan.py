"""What rows go through, and the folders that models lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.fake_model import pixels, write_fake
from trilevel.artifact.manifest import Artifact, Manifest, Tensors, write_artifact
from trilevel.errors import ArtifactError, ConfigError
from trilevel.routing.executor import Route
from trilevel.serving.catalog import Source, sources, take_snapshot
from trilevel.serving.opener import version_of
from trilevel.serving.plan import Key, Plan
from trilevel.serving.requests import TensorSpec

ROUTED = {"is_routed": True, "reason": ""}
PLAIN = {"is_routed": False, "reason": ""}


def whole(
    folder: Path, task: str, inputs: dict[str, Tensors], outputs: dict[str, Tensors], **settings: Any
) -> Artifact:
    manifest = Manifest(
        task=task,
        name="whole",
        trilevel="0",
        precision="int8",
        target="portable",
        inputs=inputs,
        outputs=outputs,
        settings=settings,
    )
    files = {name: (lambda path: path.write_bytes(b"x") and None) for name in ("model.onnx", "probe.npz")}
    return write_artifact(folder, manifest, files)


def text(folder: Path, output: tuple[int | str, ...] = ("batch", 5), max_tokens: int = 80) -> Artifact:
    tokens = Tensors(dtype="int64", axes=("batch", "tokens"))
    inputs = {"input_ids": tokens, "attention_mask": tokens}
    outputs = {"vector": Tensors(dtype="float32", axes=output)}
    return whole(folder, "embedding", inputs, outputs, max_tokens=max_tokens, padding_id=9)


def ids(*lengths: int, width: int) -> dict[str, Any]:
    mask = np.array([[place < length for place in range(width)] for length in lengths], np.int64)
    return {"input_ids": np.where(mask, np.arange(1, width + 1), 0), "attention_mask": mask}


def test_texts_of_about_one_length_share_a_batch_however_they_were_sent(tmp_path: Path) -> None:
    plan = Plan(text(tmp_path / "a"), PLAIN)
    short, longer, last = (plan.pieces(one) for one in (ids(3, 7, width=7), ids(33, width=47), ids(70, width=70)))
    assert [piece.shapes for piece in short] == [((32,),)] * 2
    assert longer[0].shapes == ((64,),)
    # no longer than the model reads
    assert last[0].shapes == ((80,),)
    row = short[0].arrays
    assert row["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0, 0, *[9] * 25]]
    assert row["attention_mask"].tolist() == [[1] * 3 + [0] * 29]
    assert row["input_ids"].dtype == np.int64


def test_answers_for_each_token_are_not_padded(tmp_path: Path) -> None:
    plan = Plan(text(tmp_path / "a", output=("batch", "tokens")), PLAIN)
    (piece,) = plan.pieces(ids(3, width=7))
    assert piece.arrays["input_ids"].shape == (1, 7)


def test_documents_are_left_as_they_are(tmp_path: Path) -> None:
    tokens, units = (Tensors(dtype="int64", axes=("batch", axis)) for axis in ("tokens", "units"))
    outputs = {"scores": Tensors(dtype="float32", axes=("batch", "units"))}
    plan = Plan(whole(tmp_path / "a", "documents", {"input_ids": tokens, "unit_ends": units}, outputs), PLAIN)
    found = plan.pieces({"input_ids": np.zeros((2, 50), np.int64), "unit_ends": np.full((2, 3), 50)})
    assert [(piece.shapes, piece.length) for piece in found] == [(((50,), (3,)), 50)] * 2
    assert plan.paths == ("int8/1",)
    assert plan.specs[1] == (TensorSpec(name="scores", dtype="float32", shape=(-1, -1)),)
    assert plan.bound == 0
    assert not plan.fit(Key(plan.full, 0, (), 50)).is_known


def test_a_queue_begins_with_what_was_measured(tmp_path: Path) -> None:
    plan = Plan(write_fake(tmp_path / "fake"), ROUTED)
    cheap = Route("int8", (1, 2), 2)
    # milliseconds through each segment: 1 and 2 for a row, 8 and 16 for eight
    assert plan.fit(Key(cheap, 1, (), 1)).seconds(4) == pytest.approx(0.004)
    assert plan.fit(Key(plan.full, 0, (), 1)).seconds(1) == pytest.approx(0.004)
    assert plan.start(plan.features({"pixels": pixels(1)})) == [cheap]
    assert plan.margins(cheap, 0) == (2.0, 2.0)
    assert plan.margins(cheap, 1) == (2.0,)
    assert plan.margins(plan.full, 0) == (None,)
    plan.stop("an alarm")
    assert plan.margins(cheap, 1) == (1e9,)
    assert plan.start(plan.features({"pixels": pixels(1)})) is None
    assert plan.paths == ("float32/1",)


@pytest.mark.parametrize("given", ["", "=", "a b", "../x", "x" * 65])
def test_names_of_models(given: str) -> None:
    with pytest.raises(ConfigError, match="is none"):
        Source(name=given, folder=Path())


def test_models_that_were_named(tmp_path: Path) -> None:
    found = sources(["mail=some/folder", str(tmp_path / "texts")])
    assert [(one.name, one.folder) for one in found] == [
        ("mail", Path("some/folder")),
        ("texts", tmp_path / "texts"),
    ]
    with pytest.raises(ConfigError, match="texts twice"):
        sources(["a/texts", "b/texts"])
    with pytest.raises(ConfigError, match="0 artifacts"):
        sources([])


def test_a_snapshot_stays_what_it_was(tmp_path: Path) -> None:
    source = Source(name="fake", folder=tmp_path / "fake")
    with pytest.raises(ArtifactError, match="no artifact"):
        take_snapshot(source)
    first = version_of(write_fake(source.folder))
    snapshot = take_snapshot(source)
    assert snapshot.version == first
    assert snapshot.artifact.path == snapshot.folder
    assert version_of(write_fake(source.folder, offset=1.0)) != first
    assert version_of(snapshot.artifact) == first
    assert snapshot.artifact.file("router.json").is_file()
    snapshot.remove()
    assert not snapshot.folder.exists()
    assert source.folder.exists()
