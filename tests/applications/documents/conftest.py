"""A small document, a small model and the shipped tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trilevel.applications.documents.checkpoint import shipped_tokenizer
from trilevel.applications.documents.model import DocumentModel, default_config
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.data.documents import Document

TEXT = """# Motivation
Attention over long documents is expensive because every token looks at every other token. This is slow.
Memory grows with the square of the length of the document.
## Local level
Local heads see a window of neighbouring tokens around each query. They are cheap.
- Global heads see a few selected tokens anywhere in the document.
- short item
## Regional level
Regional heads see one summary of every region of the document."""
ABSTRACT = "Attention over long documents is expensive. Heads see a window, summaries of regions and selected tokens."


@pytest.fixture
def document() -> Document:
    return Document(id="d", title="Levels of attention", text=TEXT, abstract=ABSTRACT, split="train")


@pytest.fixture(scope="session")
def tokenizer() -> DocumentTokenizer:
    return shipped_tokenizer()


@pytest.fixture
def model(tokenizer: DocumentTokenizer) -> DocumentModel:
    torch.manual_seed(0)
    made = DocumentModel(default_config(tokenizer.vocab_size))
    # the score starts at zero; a trained one does not
    torch.nn.init.normal_(made.score.weight)
    return made.eval()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRILEVEL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tech_path(data_dir: Path) -> Path:
    path = data_dir / "docs" / "tech.jsonl.xz"
    if not path.exists():
        pytest.skip(f"{path} is not there; it holds the technical documents")
    return path
