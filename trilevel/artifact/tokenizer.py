"""The tokenizer of an artifact."""

from __future__ import annotations

from typing import Any

from trilevel.artifact.manifest import TOKENIZER_FILE, Artifact
from trilevel.errors import ArtifactError, require


def read_tokenizer(artifact: Artifact) -> Any:
    """The `tokenizers.Tokenizer` of an artifact.

    Raises:
        ArtifactError: there is none, or the file is none.
        MissingExtraError: tokenizers is not installed.
    """
    path = artifact.file(TOKENIZER_FILE)
    tokenizers = require("tokenizers", extra="documents")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # tokenizers raises plain Exception
    except Exception as error:
        raise ArtifactError(f"{path} is no tokenizer ({error}). Export the model again.") from error
