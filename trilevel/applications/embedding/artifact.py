"""A text encoder as an artifact: written with torch, run without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trilevel.artifact.manifest import Artifact
from trilevel.artifact.runtime.predictor import Predictor
from trilevel.artifact.tokenizer import read_tokenizer
from trilevel.data.token_rows import BATCH_TOKENS, batches, characters, check_lengths, check_texts, pad

if TYPE_CHECKING:
    from trilevel.conversion.source import Source

_TOKENIZED_AT_ONCE = 64


def export_embedding(
    source: str | Path | Source, out: str | Path, *, target: str = "portable", tell: Callable[[str], None] = print
) -> Artifact:
    """Write an encoder with its pooling as an artifact; see `export_artifact` for the rest.

    Args:
        source: a folder of `trilevel convert` or `compress`, or whatever `load_source` takes; or a `Source`.
        out: see there.
        target: see there.
        tell: see there.

    Raises:
        CheckpointError: the encoder is damaged, or there is none.
        InputError: it reads images.
    """
    from trilevel.applications.probes import text_calls
    from trilevel.artifact.export.artifact import Graph, export_artifact
    from trilevel.conversion.embed import Pooled
    from trilevel.conversion.load import load_encoder
    from trilevel.conversion.sequences import check_text

    own = load_encoder(source) if isinstance(source, (str, Path)) else source
    check_text(own)
    config, padding_id = own.encoder.config, 0 if own.padding_id is None else own.padding_id
    # the folder that it was made from is nobody's business
    name = Path(own.name).name
    graph = Graph(
        task="embedding",
        name=name,
        module=Pooled(own.encoder, own.sentence).eval(),
        calls=text_calls(own.tokenizer, max_tokens=config.max_tokens, padding_id=padding_id),
        axes={
            "input_ids": ("batch", "tokens"),
            "attention_mask": ("batch", "tokens"),
            "vector": ("batch", config.dim),
        },
        output="vector",
        settings={
            "max_tokens": config.max_tokens,
            "padding_id": padding_id,
            "pooling": own.sentence.pooling,
            "normalize": own.sentence.normalize,
        },
        levels=config.to_dict()["levels"],
        tokenizer=own.tokenizer.to_str(),
        about=f"Makes a vector of {config.dim} numbers of a text; {config.max_tokens:,} tokens are read at most.",
    )
    return export_artifact(graph, out, target=target, tell=tell)


class EmbeddingPredictor:
    """Vectors of texts, by an artifact's graph in any runtime."""

    def __init__(self, artifact: Artifact, predictor: Predictor) -> None:
        manifest = artifact.manifest
        self._predictor, self._tokenizer = predictor, read_tokenizer(artifact)
        self._name, self._max_tokens = manifest.name, int(manifest.settings["max_tokens"])
        self._padding_id = int(manifest.settings["padding_id"])
        self.dim = int(manifest.outputs["vector"].axes[1])

    def predict(self, inputs: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors (texts, dim) in the order of the texts; an empty text is its special tokens, without any zeros.

        Raises:
            InputError: `inputs` is one text, holds something else, or a text is longer than the encoder reads.
        """
        check_texts(inputs)
        rows: list[list[int]] = []
        for start in range(0, len(inputs), _TOKENIZED_AT_ONCE):
            some = self._tokenizer.encode_batch(list(map(characters, inputs[start : start + _TOKENIZED_AT_ONCE])))
            rows += [one.ids for one in some]
        lengths = [len(row) for row in rows]
        check_lengths(lengths, self._max_tokens, self._name)
        found = np.zeros((len(rows), self.dim), np.float32)
        for places in batches(lengths, BATCH_TOKENS):
            found[places] = self._predictor.run(pad([rows[place] for place in places], self._padding_id))["vector"]
        return found
