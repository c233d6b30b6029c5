"""What people send to a server, against what `predict` gives for the same; what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import trilevel
from tests.artifact import tasks
from trilevel.applications.documents.artifact import INT8
from trilevel.applications.serving import task_routes
from trilevel.artifact.manifest import Artifact, read_artifact
from trilevel.artifact.runtime.predictor import load_predictor
from trilevel.errors import InputError
from trilevel.serving.opener import version_of
from trilevel.serving.requests import Engine, ModelInfo, Reply, UnavailableError, UnknownModelError
from trilevel.serving.tasks import TaskRoute, Upload

TEXT = "# Levels\nLocal heads see a window of tokens. Regional heads see summaries of regions. This is short.\n"
JSON = "application/json"
Made = Callable[[str], Artifact]


class Known:
    """An engine that knows models and answers nothing."""

    def __init__(self, *artifacts: Artifact) -> None:
        self.infos = [self.info(f"m{number}", artifact) for number, artifact in enumerate(artifacts)]
        self.folders = {f"m{number}": artifact.path for number, artifact in enumerate(artifacts)}

    @staticmethod
    def info(name: str, artifact: Artifact) -> ModelInfo:
        return ModelInfo(
            name=name,
            version=version_of(artifact),
            task=artifact.manifest.task,
            state="READY",
            inputs=(),
            outputs=(),
            paths=("float32/1",),
            settings=artifact.manifest.settings,
        )

    def models(self) -> tuple[ModelInfo, ...]:
        return tuple(self.infos)

    def routes(self) -> Mapping[str, TaskRoute]:
        return task_routes(cast("Engine", self), self.folders)


def upload(body: bytes | dict[str, Any], content_type: str = JSON, **parameters: str) -> Upload:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    return Upload(body=data, content_type=content_type, parameters=parameters, id="7", deadline=None)


def answered(route: TaskRoute, sent: Upload, artifact: Artifact) -> Mapping[str, Any]:
    prepared = route.prepare(sent)
    outputs = load_predictor(artifact, "onnxruntime", threads=1).run(dict(prepared.request.inputs))
    rows = len(next(iter(outputs.values())))
    reply = Reply(model="m0", version=prepared.request.version, outputs=outputs, paths=("float32/1",) * rows)
    return prepared.answer(reply)


def test_classes_of_texts(task_artifact: Made) -> None:
    artifact = task_artifact("classification")
    (route,) = Known(artifact).routes().values()
    texts = [text for text in tasks.TEXTS if text.strip()]
    wanted = trilevel.load(artifact.path, runtime="onnxruntime", threads=1).predict(texts)
    found = answered(route, upload({"inputs": texts, "model": "m0", "max_loss": 0.02, "explain": True}), artifact)
    assert [one["label"] for one in found["predictions"]] == [one.label for one in wanted]
    for one, other in zip(found["predictions"], wanted, strict=True):
        assert one["probabilities"] == pytest.approx(other.probabilities, abs=1e-5)
    request = route.prepare(upload({"inputs": texts[:1], "max_loss": 0.02, "explain": True})).request
    assert (request.id, request.max_loss, request.is_explained) == ("7", 0.02, True)
    # one text as it is, a model by the address
    alone = upload(texts[0].encode(), "text/plain", model="m0", max_loss="0.02", explain="true")
    assert answered(route, alone, artifact)["predictions"][0]["label"] == wanted[0].label
    assert (route.prepare(alone).request.max_loss, route.prepare(alone).request.is_explained) == (0.02, True)
    with pytest.raises(InputError, match="max_loss is a str; a number is needed"):
        route.prepare(upload(texts[0].encode(), "text/plain", max_loss="much"))


def test_vectors_of_texts(task_artifact: Made) -> None:
    artifact = task_artifact("embedding")
    (route,) = Known(artifact).routes().values()
    found = answered(route, upload({"inputs": list(tasks.TEXTS)}), artifact)
    wanted = trilevel.load(artifact.path, runtime="onnxruntime", threads=1).predict(tasks.TEXTS)
    np.testing.assert_allclose(found["vectors"], wanted, atol=1e-5)


def test_classes_of_images(task_artifact: Made, tmp_path: Path) -> None:
    artifact = task_artifact("images")
    (route,) = Known(artifact).routes().values()
    paths = tasks.write_pictures(tmp_path)
    wanted = trilevel.load(artifact.path, runtime="onnxruntime", threads=1).predict(paths)
    sent = {"inputs": [base64.b64encode(path.read_bytes()).decode() for path in paths]}
    found = answered(route, upload(sent), artifact)
    assert [one["label"] for one in found["predictions"]] == [one.label for one in wanted]
    alone = answered(route, upload(paths[0].read_bytes(), "image/png"), artifact)
    assert alone["predictions"][0]["probabilities"] == pytest.approx(wanted[0].probabilities, abs=1e-5)
    with pytest.raises(InputError, match="image 0: not a readable image"):
        route.prepare(upload(b"no image", "image/png"))
    with pytest.raises(InputError, match="input 0 is no base64"):
        route.prepare(upload({"inputs": ["?"]}))
    with pytest.raises(InputError, match="the model reads images"):
        route.prepare(upload(b"a text", "text/plain"))


@pytest.mark.parametrize(
    ("sent", "content_type"),
    [
        (json.dumps({"text": TEXT, "sentences": 2}).encode(), JSON),
        (TEXT.encode(), "text/markdown"),
        (TEXT.encode(), "text/plain"),
        (
            b"<h1>Levels</h1><p>Local heads see a window of tokens. Regional heads see summaries of regions.</p>",
            "text/html",
        ),
    ],
)
def test_summaries(sent: bytes, content_type: str) -> None:
    artifact = read_artifact(INT8)
    routes = Known(artifact).routes()
    assert list(routes) == ["summarize"]
    found = answered(
        routes["summarize"],
        upload(sent, content_type, **({} if content_type == JSON else {"sentences": "2"})),
        artifact,
    )
    assert len(found["sentences"]) == 2
    assert all(sentence.startswith(("Local", "Regional", "This")) for sentence in found["sentences"])
    assert "document" not in found
    if content_type == JSON:
        (wanted,) = trilevel.load(INT8, runtime="onnxruntime", threads=1).task.predict([TEXT], num_sentences=2)
        assert found["sentences"] == wanted.sentences
        assert found["places"] == wanted.indices


def test_explained_summaries_hold_what_was_read() -> None:
    artifact = read_artifact(INT8)
    (route,) = Known(artifact).routes().values()
    found = answered(route, upload({"text": TEXT, "sentences": 2, "explain": True}), artifact)
    read = found["document"]
    assert [one["kind"] for one in read] == ["heading", "sentence", "sentence", "sentence"]
    assert [read[place]["text"] for place in found["places"]] == found["sentences"]
    assert [read[place]["score"] for place in found["places"]] == found["scores"]


# error messages


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is no JSON"),
        (b"[1]", "the body is a JSON list; an object is needed"),
        (b"[" * 100_000, "the body is no JSON"),
        (b'{"inputs": []}', '"inputs" must be a list of one text or more'),
        (b'{"inputs": ["a", 3]}', '"inputs" must be a list of one text or more'),
        (b'{"inputs": [" "]}', "text 0 is empty"),
        (b'{"inputs": ["a"], "max_loss": "much"}', "max_loss is a str; a number is needed"),
    ],
)
def test_bodies_that_cannot_be_used(task_artifact: Made, body: bytes, message: str) -> None:
    (route,) = Known(task_artifact("classification")).routes().values()
    with pytest.raises(InputError, match=message):
        route.prepare(upload(body))


def test_models_and_versions_that_are_not_there(task_artifact: Made) -> None:
    engine = Known(task_artifact("classification"), task_artifact("embedding"), read_artifact(INT8))
    routes = engine.routes()
    assert sorted(routes) == ["predict", "summarize"]
    with pytest.raises(UnknownModelError, match="no model 'None' answers this; name one of m0, m1"):
        routes["predict"].prepare(upload({"inputs": ["a"]}))
    with pytest.raises(UnknownModelError, match="no model 'm2' answers this"):
        routes["predict"].prepare(upload({"inputs": ["a"], "model": "m2"}))
    with pytest.raises(InputError, match="not UTF-8"):
        routes["summarize"].prepare(upload(b"\xff", "text/plain"))
    with pytest.raises(InputError, match="no text to summarise"):
        routes["summarize"].prepare(upload({"text": " "}))
    with pytest.raises(InputError, match='"text" must be a text'):
        routes["summarize"].prepare(upload({"text": 3}))
    with pytest.raises(InputError, match=r"sentences=1\.5 is no whole number"):
        routes["summarize"].prepare(upload({"text": TEXT, "sentences": 1.5}))
    # written anew, and not loaded yet
    engine.folders["m0"] = engine.folders["m1"]
    with pytest.raises(UnavailableError, match="'m0' is being exchanged for another version"):
        engine.routes()["predict"].prepare(upload({"inputs": ["a"], "model": "m0"}))
