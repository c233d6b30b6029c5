"""Encoding, cutting, the cache and the batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from trilevel.applications.documents.data import DocumentBatches, collate, encode_corpus
from trilevel.applications.documents.encoded import Encoded, encode
from trilevel.applications.documents.tokenizer import DocumentTokenizer
from trilevel.applications.documents.units import split_units
from trilevel.data.documents import Document
from trilevel.data.places import cache_dir
from trilevel.errors import InputError


@pytest.fixture
def encoded(document: Document, tokenizer: DocumentTokenizer) -> Encoded:
    return encode(split_units(document), tokenizer, abstract=document.abstract)


def test_every_unit_has_its_tokens(document: Document, tokenizer: DocumentTokenizer, encoded: Encoded) -> None:
    units = split_units(document)
    for number, unit in enumerate(units):
        ids = encoded.input_ids[encoded.unit_ids == number]
        assert tokenizer.decode(ids.tolist()).strip() == unit.text.lower()
    assert encoded.oracle.any()
    assert not encoded.oracle[~encoded.unit_selectable].any()


@pytest.mark.parametrize("limit", [1, 2, 7, 23, 41, 10_000])
def test_cut_keeps_whole_units(encoded: Encoded, limit: int) -> None:
    cut = encoded.cut(limit)
    kept = len(cut.unit_prior)
    assert cut.num_tokens <= limit
    assert kept >= 1
    assert cut.units_left_out == len(encoded.unit_prior) - kept
    assert cut.unit_ids.max() == kept - 1 if cut.num_tokens else True
    if 0 < kept < len(encoded.unit_prior) and limit > 10:
        # one more unit would not fit
        assert int((encoded.unit_ids <= kept).sum()) > limit


def test_a_limit_while_encoding_equals_a_cut_afterwards(
    document: Document, tokenizer: DocumentTokenizer, encoded: Encoded
) -> None:
    units = split_units(document)
    limited = encode(units, tokenizer, abstract=document.abstract, max_tokens=31)
    for name in ("input_ids", "unit_ids", "unit_features", "oracle"):
        assert np.array_equal(getattr(limited, name), getattr(encoded.cut(31), name))


def test_no_units_is_an_error(tokenizer: DocumentTokenizer) -> None:
    with pytest.raises(InputError, match="no title, heading or sentence"):
        encode([], tokenizer)


def test_units_without_tokens_keep_their_place(tokenizer: DocumentTokenizer) -> None:
    units = split_units(Document(id="", title="Title", text="One sentence is here."))
    odd = [replace(units[0], text=""), units[1]]
    assert encode(odd, tokenizer).unit_ids[0] == 0


def test_collate_pads(encoded: Encoded) -> None:
    short = encoded.cut(23)
    batch = collate([encoded, short])
    n = short.num_tokens
    assert batch["padding_mask"][1].tolist() == [False] * n + [True] * (encoded.num_tokens - n)
    assert (batch["unit_ids"][1, n:] == -1).all()
    assert batch["unit_padding"][1].sum() == len(encoded.unit_prior) - len(short.unit_prior)
    assert not batch["unit_selectable"][batch["unit_padding"]].any()
    assert torch.equal(batch["global_prior"][0], torch.from_numpy(encoded.unit_prior[encoded.unit_ids]))


def test_the_cache_gives_the_same_again(document: Document, tokenizer: DocumentTokenizer) -> None:
    documents = [document, replace(document, id="e", text=document.text + "\nOne more sentence stands here.")]
    first = encode_corpus(documents, tokenizer)
    assert len(list(cache_dir().glob("documents-*.npz"))) == 1
    second = encode_corpus(documents, tokenizer)
    for a, b in zip(first, second, strict=True):
        for name in ("input_ids", "unit_ids", "unit_prior", "unit_features", "unit_selectable", "oracle", "gains"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
    encode_corpus(documents[:1], tokenizer)
    assert len(list(cache_dir().glob("documents-*.npz"))) == 2


def made(lengths: list[int]) -> list[Encoded]:
    """Documents of one-token units; the first token is the document's number."""
    return [
        Encoded(
            input_ids=np.full(n, number + 1, np.int32),
            unit_ids=np.arange(n, dtype=np.int32),
            unit_prior=np.zeros(n, np.float32),
            unit_features=np.zeros((n, 11), np.int8),
            unit_selectable=np.ones(n, bool),
            oracle=np.eye(1, n, dtype=np.float32)[0],
            gains=np.ones(n, np.float32),
        )
        for number, n in enumerate(lengths)
    ]


def test_an_epoch_holds_every_document_once_within_the_budget() -> None:
    batches = DocumentBatches(made([3, 5, 7, 11, 13, 17, 2, 29]), max_tokens=19, max_batch_tokens=31, seed=3)
    seen: list[int] = []
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        ids = batch["input_ids"]
        assert ids.shape[1] <= 19
        assert ids.numel() <= 31 or len(ids) == 1
        seen += ids[:, 0].tolist()
    assert sorted(seen) == list(range(1, 9))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    documents = made([3, 5, 7, 11, 13, 17])
    one = DocumentBatches(documents, max_tokens=19, max_batch_tokens=31, seed=3)
    two = DocumentBatches(documents, max_tokens=19, max_batch_tokens=31, seed=3)
    late = one.batch(9)
    for step in range(12):
        two.batch(step)
    assert torch.equal(late["input_ids"], two.batch(9)["input_ids"])


def test_documents_without_an_oracle_are_not_used() -> None:
    documents = made([3, 5])
    blank = replace(documents[0], oracle=np.zeros(3, np.float32))
    assert DocumentBatches([blank, documents[1]], max_tokens=9, max_batch_tokens=9).steps_per_epoch == 1
    with pytest.raises(InputError, match="No document has an oracle sentence"):
        DocumentBatches([blank], max_tokens=9, max_batch_tokens=9)
