"""The documents model as an artifact: written with torch, run without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trilevel.applications.documents.encoded import Encoded, padded
from trilevel.applications.documents.summary import Summary, selection_of, summary_of
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.artifact.manifest import Artifact
from trilevel.artifact.runtime.predictor import Predictor
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.data.documents import Document, read_file
from trilevel.errors import InputError

INT8 = Path(__file__).parent / "artifact-int8"
"""The shipped model in INT8, made by `scripts/documents_artifact.py`."""


def graph_inputs(documents: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """What the graph takes: documents padded to one batch, where each unit ends, and units of padding without tokens.

    input_ids int64 and token_prior (batch, tokens); unit_ends int64 and unit_prior (batch, units); unit_features int64
    (batch, units, 11).
    """
    arrays = padded(documents)
    units = np.arange(arrays["unit_prior"].shape[1])
    ends = np.stack([np.searchsorted(document.unit_ids, units, side="right") for document in documents])
    return {
        "input_ids": arrays["input_ids"],
        "token_prior": arrays["global_prior"],
        "unit_ends": ends.astype(np.int64),
        "unit_features": arrays["unit_features"],
        "unit_prior": arrays["unit_prior"],
    }


def export_documents(
    source: str | Path | None,
    out: str | Path,
    *,
    target: str = "portable",
    calibration: Sequence[Document] | None = None,
    tell: Callable[[str], None] = print,
) -> Artifact:
    """Write a documents model as an artifact; see `export_artifact` for the rest.

    Args:
        source: a run folder, float or compressed; None is the shipped model.
        out: see there.
        target: see there.
        calibration: documents like those that will be summarised; a float model is then rounded to INT8, which needs
            no training. None writes the weights as they are.
        tell: see there.

    Raises:
        CheckpointError: the run is damaged, or is of another kind.
        ConfigError: the model is compressed and documents are given.
    """
    from trilevel.applications.documents.export import export

    return export(source, out, target=target, calibration=calibration, tell=tell)


class DocumentPredictor:
    """Summaries by an artifact's graph in any runtime."""

    def __init__(self, artifact: Artifact, predictor: Predictor) -> None:
        self._predictor = predictor
        self._tokenizer = DocumentTokenizer(read_tokenizer(artifact))
        self._max_tokens = int(artifact.manifest.settings["max_tokens"])

    def score(self, document: Encoded) -> np.ndarray:
        """Scores of one document's units, (units,) float32."""
        scores: np.ndarray = self._predictor.run(graph_inputs([document]))["scores"][0]
        return scores

    def predict(
        self,
        inputs: Sequence[str | Path | Document],
        *,
        num_sentences: int | None = None,
        budget_words: int | None = None,
        max_overlap: float = 0.5,
    ) -> list[Summary]:
        """Summaries in the order of the inputs, within `num_sentences` or `budget_words` (59 words when neither is).

        Args:
            inputs: texts (`# ` begins a heading); paths of files; documents.
            num_sentences: of a summary, at most.
            budget_words: of a summary, at most.
            max_overlap: see `Selection`.

        Raises:
            InputError: `inputs` is one text, a file cannot be read, or a document has no word.
            ConfigError: both budgets are given, or one is below 1.
        """
        if isinstance(inputs, (str, Path, Document)):
            raise InputError("one document was given; a list is needed, as in predict([document]).")
        selection = selection_of(num_sentences=num_sentences, budget_words=budget_words, max_overlap=max_overlap)
        documents = map(_document, inputs)
        return [
            summary_of(document, self._tokenizer, self.score, selection, max_tokens=self._max_tokens)
            for document in documents
        ]


def _document(given: str | Path | Document) -> Document:
    if isinstance(given, Document):
        return given
    if isinstance(given, Path):
        return read_file(given)
    if isinstance(given, str):
        return Document(id="", title="", text=given)
    raise InputError(f"a {type(given).__name__} was given; a text, a Path or a Document is needed.")
