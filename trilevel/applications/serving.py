"""`POST /v1/predict` and `/v1/summarize`: texts, files and pictures to tensors, and what comes out to words."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np

from trilevel.applications.documents.artifact import graph_inputs
from trilevel.applications.documents.encoded import encode as encode_document
from trilevel.applications.documents.summary import choose_units, selection_of
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.artifact.manifest import Artifact, labels_of, read_artifact
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.data import readers
from trilevel.data.documents import Document
from trilevel.data.images import read_image, resized, with_channels
from trilevel.data.token_rows import characters, check_lengths, encode, pad, softmax
from trilevel.errors import InputError
from trilevel.serving.opener import version_of
from trilevel.serving.requests import Engine, ModelInfo, Reply, Request, UnavailableError, UnknownModelError
from trilevel.serving.tasks import Prepared, TaskRoute, Upload

JSON, TEXT = "application/json", "text/plain"
_IMAGES = ("image/png", "image/jpeg", "image/webp", "image/bmp")
_READERS: dict[str, Callable[[str], readers.Content]] = {
    TEXT: readers.read_text,
    "text/markdown": readers.read_markdown,
    "text/html": readers.read_html,
}
MOST_INPUTS = 1_024
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "model": {"type": "string", "description": "Its name; needed where several answer such requests."},
    "max_loss": {"type": "number", "minimum": 0, "description": "Below what the certificate promises: the full path."},
    "explain": {"type": "boolean", "description": "Whether to say why each row took its path."},
}
_PREDICT: Mapping[str, Mapping[str, Any]] = {
    "inputs": {
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
        "maxItems": MOST_INPUTS,
        "description": "Texts, or images in base64.",
    },
    **_FIELDS,
}
_SUMMARIZE: Mapping[str, Mapping[str, Any]] = {
    "text": {"type": "string"},
    "title": {"type": "string"},
    "sentences": {"type": "integer", "minimum": 1, "description": "How many at most."},
    "words": {"type": "integer", "minimum": 1, "description": "How many at most."},
    **_FIELDS,
}
Arrays = dict[str, np.ndarray]
Answer = Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]


class _Handler(Protocol):
    """A version of a model: what people send to its arrays, and its outputs to words."""

    def __call__(self, upload: Upload) -> tuple[Arrays, Answer]:
        """The arrays, and what makes words of the outputs; raises InputError."""
        ...


def task_routes(engine: Engine, folders: Mapping[str, Path]) -> dict[str, TaskRoute]:
    """The routes that the served models can answer.

    Args:
        engine: that answers.
        folders: of the artifacts, by the names that they are served under.
    """
    tasks = {info.task for info in engine.models()}
    routes: dict[str, TaskRoute] = {}
    if tasks - {"documents"}:
        said = "Classes of texts or images, or vectors of texts."
        routes["predict"] = _Route(
            engine, folders, tuple(_HANDLERS), said, (JSON, TEXT, *_IMAGES), _PREDICT, ("inputs",)
        )
    if "documents" in tasks:
        said = "The most important sentences of a text or file."
        routes["summarize"] = _Route(
            engine, folders, ("documents",), said, (JSON, *_READERS, "application/pdf"), _SUMMARIZE, ("text", "title")
        )
    return routes


@final
class _Route:
    """See `TaskRoute`; artifacts are read when a version of them is first asked."""

    def __init__(
        self,
        engine: Engine,
        folders: Mapping[str, Path],
        tasks: Sequence[str],
        summary: str,
        content_types: tuple[str, ...],
        fields: Mapping[str, Mapping[str, Any]],
        content: tuple[str, ...],
    ) -> None:
        self.summary, self.content_types = summary, content_types
        self.fields, self.content = fields, content
        self._engine, self._folders, self._tasks = engine, dict(folders), tuple(tasks)
        # by name: the version, and what was made of it
        self._opened: dict[str, tuple[str, _Handler]] = {}

    def prepare(self, upload: Upload) -> Prepared:
        """See `TaskRoute`."""
        info = self._model(upload)
        arrays, words = self._handler(info)(upload)
        asked = _fields(upload)
        request = Request(
            id=upload.id,
            model=info.name,
            version=info.version,
            inputs=arrays,
            deadline=upload.deadline,
            max_loss=_max_loss(asked),
            is_explained=_is_explained(asked),
        )
        return Prepared(request=request, answer=lambda reply: _told(reply, words(reply.outputs)))

    def _model(self, upload: Upload) -> ModelInfo:
        """That which is named, or the only one that answers such requests."""
        own = [info for info in self._engine.models() if info.task in self._tasks]
        name = upload.parameters.get("model") or _fields(upload).get("model")
        if name is None and len(own) == 1:
            return own[0]
        for info in own:
            if info.name == name:
                return info
        known = ", ".join(info.name for info in own)
        raise UnknownModelError(f"no model {str(name)[:80]!r} answers this; name one of {known} (model).")

    def _handler(self, info: ModelInfo) -> _Handler:
        version, handler = self._opened.get(info.name, ("", None))
        if handler is None or version != info.version:
            if not info.version:
                raise UnavailableError(f"model {info.name!r} does not answer: {info.reason}.")
            artifact = read_artifact(self._folders[info.name])
            if version_of(artifact) != info.version:
                raise UnavailableError(f"model {info.name!r} is being exchanged for another version; ask again.")
            handler = {**_HANDLERS, "documents": _Documents}[info.task](artifact)
            self._opened[info.name] = info.version, handler
        return handler


def _told(reply: Reply, words: Mapping[str, Any]) -> Mapping[str, Any]:
    found = {"model": reply.model, "version": reply.version, **words, "paths": list(reply.paths)}
    found |= {"seconds": {name: round(seconds, 6) for name, seconds in reply.seconds.items()}}
    return found | ({"explanations": list(reply.explanations)} if reply.explanations else {})


def _fields(upload: Upload) -> Mapping[str, Any]:
    """The object that was sent as JSON, else the parameters of the address."""
    if upload.content_type != JSON:
        return upload.parameters
    try:
        found = json.loads(upload.body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON ({error}).") from error
    if not isinstance(found, dict):
        raise InputError(f'the body is a JSON {type(found).__name__}; an object is needed, as in {{"inputs": [...]}}.')
    return found


def _text(upload: Upload) -> str:
    try:
        return upload.body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"the body is not UTF-8 ({error.reason} at byte {error.start}).") from error


def _inputs(upload: Upload) -> list[str]:
    """The texts of `inputs`, or the whole body."""
    if upload.content_type == TEXT:
        return [_text(upload)]
    found = _fields(upload).get("inputs")
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise InputError('"inputs" must be a list of one text or more, as in {"inputs": ["a text"]}.')
    if len(found) > MOST_INPUTS:
        raise InputError(f'"inputs" has {len(found):,} texts; {MOST_INPUTS:,} may be sent at once.')
    return found


class _Texts:
    """Classes of texts."""

    def __init__(self, artifact: Artifact) -> None:
        settings = artifact.manifest.settings
        self._tokenizer, self._labels = read_tokenizer(artifact), labels_of(artifact.manifest)
        self._most, self._padding_id = int(settings["max_tokens"]), int(settings["padding_id"])

    def __call__(self, upload: Upload) -> tuple[Arrays, Answer]:
        """See `_Handler`."""
        texts = [characters(text.strip()) for text in _inputs(upload)]
        if not all(texts):
            raise InputError(f"text {texts.index('')} is empty; a text with at least one word is needed.")
        rows, _ = encode(self._tokenizer, texts, max_tokens=self._most, padding_id=self._padding_id)
        return pad(rows, self._padding_id), lambda outputs: _classes(outputs["logits"], self._labels)


class _Vectors:
    """Vectors of texts."""

    def __init__(self, artifact: Artifact) -> None:
        settings = artifact.manifest.settings
        self._tokenizer, self._name = read_tokenizer(artifact), artifact.manifest.name
        self._most, self._padding_id = int(settings["max_tokens"]), int(settings["padding_id"])

    def __call__(self, upload: Upload) -> tuple[Arrays, Answer]:
        """See `_Handler`."""
        rows = [one.ids for one in self._tokenizer.encode_batch(list(map(characters, _inputs(upload))))]
        check_lengths([len(row) for row in rows], self._most, self._name)
        return pad(rows, self._padding_id), lambda outputs: {"vectors": outputs["vector"].tolist()}


class _Images:
    """Classes of images: a body that is one, or base64 in `inputs`."""

    def __init__(self, artifact: Artifact) -> None:
        self._labels = labels_of(artifact.manifest)
        self._channels, *self._size = map(int, artifact.manifest.inputs["pixels"].axes[1:])

    def __call__(self, upload: Upload) -> tuple[Arrays, Answer]:
        """See `_Handler`."""
        if upload.content_type in _IMAGES:
            files = [upload.body]
        elif upload.content_type == JSON:
            files = [_decoded(text, place) for place, text in enumerate(_inputs(upload))]
        else:
            raise InputError(f"the model reads images; send one ({', '.join(_IMAGES)}), or base64 in JSON.")
        height, width = self._size
        images = [read_image(io.BytesIO(data), name=f"image {place}") for place, data in enumerate(files)]
        pixels = np.stack(
            [one if one.shape[1:] == (height, width) else resized(one, (height, width)) for one in images]
        )
        arrays = {"pixels": np.ascontiguousarray(with_channels(pixels, self._channels))}
        return arrays, lambda outputs: _classes(outputs["logits"], self._labels)


class _Documents:
    """Summaries."""

    def __init__(self, artifact: Artifact) -> None:
        self._tokenizer = DocumentTokenizer(read_tokenizer(artifact))
        self._most = int(artifact.manifest.settings["max_tokens"])

    def __call__(self, upload: Upload) -> tuple[Arrays, Answer]:
        """See `_Handler`; `sentences` or `words` say how long a summary may be, `explain` adds all that was read."""
        fields = _fields(upload)
        title, text = self._read(upload, fields)
        if not text.strip():
            raise InputError("there is no text to summarise; send one with at least one sentence.")
        selection = selection_of(num_sentences=_count(fields, "sentences"), budget_words=_count(fields, "words"))
        units = split_units(Document(id="", title=title, text=text))
        encoded = encode_document(units, self._tokenizer, max_tokens=self._most)

        def words(outputs: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
            scores = outputs["scores"][0][: encoded.num_units]
            chosen = choose_units(units, scores, encoded, selection)
            read = [
                {"text": unit.text, "kind": unit.kind.name.lower(), "score": score}
                for unit, score in zip(units, scores.tolist(), strict=False)
            ]
            return {
                "sentences": [units[place].text for place in chosen],
                "places": chosen,
                "scores": [float(scores[place]) for place in chosen],
                "units": len(units),
                "tokens": encoded.num_tokens,
                "units_left_out": encoded.units_left_out,
                **({"document": read} if _is_explained(fields) else {}),
            }

        return graph_inputs([encoded]), words

    def _read(self, upload: Upload, fields: Mapping[str, Any]) -> tuple[str, str]:
        if upload.content_type == JSON:
            title, text = fields.get("title", ""), fields.get("text")
            if not isinstance(text, str) or not isinstance(title, str):
                raise InputError('"text" must be a text, and "title" too where it is given, as in {"text": "..."}.')
            return title, text
        if upload.content_type == "application/pdf":
            content = readers.read_pdf(upload.body, where="the file")
        else:
            content = _READERS[upload.content_type](_text(upload))
        return content.title, content.text


_HANDLERS: dict[str, Callable[[Artifact], _Handler]] = {
    "classification": _Texts,
    "embedding": _Vectors,
    "images": _Images,
}


def _classes(logits: np.ndarray, labels: Sequence[str]) -> Mapping[str, Any]:
    chances = softmax(logits)
    return {
        "predictions": [
            {"label": labels[int(row.argmax())], "probabilities": dict(zip(labels, row.tolist(), strict=True))}
            for row in chances
        ]
    }


def _decoded(text: str, place: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"input {place} is no base64 ({error}); an image's bytes are needed.") from error


def _count(fields: Mapping[str, Any], name: str) -> int | None:
    given = fields.get(name)
    if given is None:
        return None
    if isinstance(given, str) and given.isdecimal():
        return int(given)
    if isinstance(given, bool) or not isinstance(given, int):
        raise InputError(f"{name}={given!r} is no whole number.")
    return given


def _max_loss(fields: Mapping[str, Any]) -> float | None:
    given = fields.get("max_loss")
    # addresses have texts alone
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            given = float(given)
    if given is not None and (isinstance(given, bool) or not isinstance(given, (int, float))):
        raise InputError(f"max_loss is a {type(given).__name__}; a number is needed, as in 0.01.")
    return given


def _is_explained(fields: Mapping[str, Any]) -> bool:
    return fields.get("explain") in (True, "true")
