"""A text classifier as an artifact: written with torch, run without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trilevel.applications.classification.data import clean
from trilevel.applications.classification.predictions import Item, Prediction, predictions
from trilevel.artifact.manifest import Artifact, labels_of
from trilevel.artifact.runtime.predictor import Predictor
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.data.token_rows import BATCH_TOKENS, batches, check_texts, encode, pad, softmax

if TYPE_CHECKING:
    from trilevel.applications.classification.checkpoint import Run


def export_classification(
    source: str | Path | Run, out: str | Path, *, target: str = "portable", tell: Callable[[str], None] = print
) -> Artifact:
    """Write the classifier of a run as an artifact; see `export_artifact` for the rest.

    Raises:
        CheckpointError: the run is damaged, or is of another kind.
    """
    from trilevel.applications.classification.checkpoint import load_run
    from trilevel.applications.classification.model import Masked
    from trilevel.applications.probes import text_calls
    from trilevel.artifact.export.artifact import Graph, export_artifact

    run = load_run(source) if isinstance(source, (str, Path)) else source
    config = run.model.config
    graph = Graph(
        task="classification",
        name=run.folder.resolve().name,
        module=Masked(run.model).eval(),
        calls=text_calls(run.tokenizer, max_tokens=config.max_tokens, padding_id=config.padding_id),
        axes={
            "input_ids": ("batch", "tokens"),
            "attention_mask": ("batch", "tokens"),
            "logits": ("batch", len(run.labels)),
        },
        output="logits",
        settings={
            "labels": list(run.labels),
            "max_tokens": config.max_tokens,
            "padding_id": config.padding_id,
            "text_column": run.origin.columns.text,
        },
        levels=config.encoder.to_dict()["levels"],
        tokenizer=run.tokenizer.to_str(),
        about=f"Classifies texts as {', '.join(run.labels)}; {config.max_tokens:,} tokens are read.",
    )
    return export_artifact(graph, out, target=target, tell=tell)


class ClassificationPredictor:
    """The classes of texts, by an artifact's graph in any runtime."""

    def __init__(self, artifact: Artifact, predictor: Predictor) -> None:
        self._predictor, self._tokenizer = predictor, read_tokenizer(artifact)
        settings = artifact.manifest.settings
        self._labels = labels_of(artifact.manifest)
        self._max_tokens, self._padding_id = int(settings["max_tokens"]), int(settings["padding_id"])
        self.text_column: str = settings["text_column"]

    def classify(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Softmax (texts, classes); what is behind the longest input is not read."""
        rows, _ = encode(self._tokenizer, texts, max_tokens=self._max_tokens, padding_id=self._padding_id)
        logits = np.empty((len(rows), len(self._labels)), np.float32)
        for places in batches([len(row) for row in rows], BATCH_TOKENS):
            logits[places] = self._predictor.run(pad([rows[place] for place in places], self._padding_id))["logits"]
        return softmax(logits)

    def stream(self, wanted: Iterator[Item]) -> Iterator[Prediction]:
        """Predictions in the order of the items, which may be any number."""
        return predictions(wanted, self._labels, self.classify)

    def predict(self, inputs: Iterable[str]) -> list[Prediction]:
        """Predictions of texts in their order; one without a word has no class.

        Raises:
            InputError: `inputs` is one text, or holds something else.
        """
        texts = inputs if isinstance(inputs, str) else list(inputs)
        check_texts(texts)
        return list(self.stream(Item(where="", text=clean(text)) for text in texts))
