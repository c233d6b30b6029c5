"""Any model of an application as something to compress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trilevel.applications.kinds import Kind, model_kind
from trilevel.compression.task import CompressionTask
from trilevel.errors import InputError

Progress = Callable[[str, float], None]


def load_task(
    checkpoint: str | Path,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = lambda _what, _done: None,
) -> CompressionTask:
    """The model of a run folder, or a pretrained encoder by name, with the data to compress it.

    Args:
        checkpoint: a folder that `trilevel train`, `convert` or `compress` wrote, or what `load_source` takes.
        data: in place of what the run was trained on (images, tables), of the built-in text (documents, encoders).
        limit: examples of each split, for a try.
        options: the table `data` of a plan.
        seed: of the order of examples, where the options do not name one.
        progress: told how reading goes on.

    Raises:
        InputError: the data cannot be used.
        ConfigError: an option is unknown or out of range, or the model cannot be compressed.
        CheckpointError: there is no such model, or it is damaged.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} must be >= 1.")
    options = {"seed": seed, **(options or {})}
    return _LOADERS[model_kind(checkpoint)](checkpoint, data, limit, options, progress)


def _images(checkpoint: Any, data: Any, limit: Any, options: Any, progress: Progress) -> CompressionTask:
    from trilevel.applications.images.compress import load_task

    def read(what: str, done: int, total: int) -> None:
        progress(f"{what} images", done / max(1, total))

    return load_task(checkpoint, data=data, limit=limit, options=options, on_progress=read)


def _classification(checkpoint: Any, data: Any, limit: Any, options: Any, _progress: Progress) -> CompressionTask:
    from trilevel.applications.classification.compress import load_task

    return load_task(checkpoint, data=data, limit=limit, options=options)


def _documents(checkpoint: Any, data: Any, limit: Any, options: Any, progress: Progress) -> CompressionTask:
    from trilevel.applications.documents.compress import load_task

    return load_task(checkpoint, data=data, limit=limit, options=options, progress=progress)


def _embedding(checkpoint: Any, data: Any, limit: Any, options: Any, _progress: Progress) -> CompressionTask:
    from trilevel.applications.embedding.compress import load_task

    return load_task(checkpoint, data=data, limit=limit, options=options)


_LOADERS: dict[Kind, Callable[..., CompressionTask]] = {
    "images": _images,
    "classification": _classification,
    "documents": _documents,
    "embedding": _embedding,
}
